"""The compressed-tensors format, which vLLM, SGLang, transformers and llama.cpp's converter can load.

Writing: with w8a8, codes are stored as int8, and activations are quantized per token at run time (`int-quantized`).
With w8a16, four codes are packed into each int32, and activations stay in floating point (`pack-quantized`); scales can
then be by group, in the model's dtype, to which its loaders would convert them (`kernels.groups`). Each expert is
stored separately, as in checkpoints. transformers fuses experts into one tensor, and can only do that with
packed ones.

A rotated artifact (`Format.rotation`) has the codes of W H, where H is block-diagonal with Hadamard matrices, and a
`transform_config` that tells loaders to multiply the input of the layer by H.

Reading: int, float and packed weights with one scale per tensor, row, group or block, rotated or not; and 4-bit floats.
The layout is that of the package's compressors (compressed-tensors 0.20: `naive_quantized`, `pack_quantized`, `nvfp4`
and `mxfp4`).
A module has `weight` (int8 or float8), or `weight_packed` (int32 words of 4-bit or 8-bit numbers, lowest bits first,
each stored with half its range added). It also has `weight_scale`; `weight_zero_point` if the quantization is
asymmetric; and `weight_g_idx` if the columns were reordered.
If `weight_packed` is uint8, it holds 4-bit floats (`formats.float4`). The `weight_scale` of MXFP4 is uint8. That of
NVFP4 is float8, and divided by `weight_global_scale`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np

from quantize8.artifact.manifest import summarize
from quantize8.errors import SourceError
from quantize8.formats import COMPRESSED_TENSORS, MoeLoader, Scheme
from quantize8.formats.base import (
    Int8Format,
    Measured,
    OutTensor,
    Piece,
    Pieces,
    WeightQuantizer,
    cannot_hold,
    check_finite,
    in_float,
)
from quantize8.formats.encoding import Encoding, GroupwiseInt8, RowwiseInt8, require, unpack_int32
from quantize8.formats.float4 import E8M0_TYPES, PACKED_TYPE, Float4
from quantize8.kernels import NEAREST, ROTATIONS, cpu, groups
from quantize8.kernels.reference import STATS_TILE_ROWS, Array, ColumnStats, absmax_of, as_bytes, scale_of
from quantize8.sources.base import DTYPES, FLOAT4, FLOATING, MXFP4, NVFP4, Checkpoint, TensorInfo
from quantize8.sources.experts import GATED
from quantize8.sources.structure import CONV1D, EMBEDDED, EXPERT, FUSED_EXPERTS, HEAD, LINEAR, PACKED_EXPERT, Structure
from quantize8.sources.wrapper import Renamed

if TYPE_CHECKING:
    from quantize8.conversion.plan import Plan

SCALE, PACKED, SHAPE = "weight_scale", "weight_packed", "weight_shape"
_ZERO, _ORDER, _GLOBAL = "weight_zero_point", "weight_g_idx", "weight_global_scale"
_UNUSED = ("input_scale", "input_zero_point", "input_global_scale")  # of activations
_CACHE_SCALES = (".k_scale", ".v_scale", ".q_scale")  # of an 8-bit key-value cache
_FORMATS = (
    *("int-quantized", "naive-quantized", "float-quantized", "pack-quantized", "mixed-precision"),
    *("nvfp4-pack-quantized", "mxfp4-pack-quantized"),
)
_VALUES = ("I8", "F8_E4M3")
_PACKED_BITS = (4, 8)
_OFFSET = 128  # added to codes before packing, so that they are unsigned
_WORD = 4  # codes in an int32
# vLLM fuses each of these groups into one layer with one scheme; q_a and kv_a are of multi-head latent attention (MLA)
_FUSED = re.compile(r"(?P<qkv>[qkv]_proj)$|(?P<gate_up>(?:gate|up)_proj)$|(?P<qkv_a>q_a_proj|kv_a_proj_with_mqa)$")
# vLLM's names for the experts of gpt-oss, the only ones that its loader takes packed (vllm 0.33, models/gpt_oss.py)
_IN_VLLM = {"gate_up_proj": "w13", "down_proj": "w2"}
_OURS = re.compile(rf"(?P<expert>.*\.experts\.\d+)\.(?P<part>{'|'.join(_IN_VLLM)})\.(?P<rest>\w+)")
_THEIRS = re.compile(rf"(?P<expert>.*\.experts\.\d+)\.(?P<part>{'|'.join(_IN_VLLM.values())})_(?P<rest>\w+)")
_EXPERTS = re.compile(r"(?P<layer>.*\.experts)\.\d+\.")
_GATE = ".shared_expert_gate"  # of Qwen's shared expert, N = 1; vLLM builds it without quantization
_ROUTER = ".gate"  # of models with experts, by its usual name
# A key that no loader knows. transformers 5.23 ignores a transform_config, but lets compressed-tensors check the groups
# by its own classes, which refuse the key. vLLM looks up the keys of a group one by one.
_GUARD = "requires_transform_config"
_LAYER = re.compile(r".*?(?=\w+\.\d+\.)")  # what is before `layers.0.` in a module's name


@dataclass(frozen=True)
class CompressedTensors(Int8Format):
    """Int8 in either scheme, with one scale per row or group.

    Attributes:
        scheme: w8a8 or w8a16.
        moe: The loader that the experts of a mixture-of-experts model are stored for.
        group_size: Weights of a row that share a scale, in w8a16; None for all of a row.
        rotate: Largest block of input features that a Hadamard matrix rotates; None for no rotation.
    """

    name: str = COMPRESSED_TENSORS
    suffix: str = "w8a8"
    scheme: Scheme = "w8a8"
    moe: MoeLoader = "vllm"
    group_size: int | None = None
    rotate: int | None = None
    loaders: ClassVar[tuple[str, ...]] = ("vllm", "transformers", "quantize8")
    package: ClassVar[str] = "compressed-tensors"
    holds_embeddings: ClassVar[bool] = True

    @property
    def options(self) -> frozenset[str]:
        """See `Format.options`; outlier columns and searched scales are defined for scales by row alone."""
        refused = {"columns", "scale"} if self.group_size else {"columns"} if self.rotate else set()
        return super().options - refused

    @property
    def title(self) -> str:
        """See `Format.title`."""
        grouped = f", groups of {self.group_size}" if self.group_size else ""
        return f"{self.name} {self.scheme}{grouped}{', rotated' if self.rotate else ''}"

    def linears(self, structure: Structure) -> tuple[dict[str, str], dict[str, str]]:
        """See `Int8Format.linears`."""
        modules: dict[str, str] = {}
        refused: dict[str, str] = {}
        for name, kind in structure.linears.items():
            if kind == CONV1D:
                refused[name] = "a Conv1D, which this format's loaders do not quantize"
            elif name.endswith(_GATE):
                refused[name] = "vLLM keeps this gate in floating point"
            elif structure.experts and name.endswith(_ROUTER):
                refused[name] = "named like a router, which vLLM must not quantize"
            elif self.scheme == "w8a16" and name in structure.read_on_loading:
                refused[name] = (
                    "read by transformers while it loads the model, which fails for packed codes (w8a8 has none)"
                )
            else:
                modules[name] = kind
        joint = any(name.endswith(f".{GATED}") for name in structure.experts)
        return modules | dict.fromkeys(structure.experts, PACKED_EXPERT if joint else EXPERT), refused

    def holds_experts(self, structure: Structure) -> bool:
        """See `Format.holds_experts`; for transformers, it must join them again, or replace the fused experts."""
        return self.moe == "vllm" or structure.replaced or (structure.joinable and not structure.fusions)

    def rotation(self, module: str, columns: int, kind: str) -> int:
        """See `Int8Format.rotation`; vLLM rotates the inputs of Linear layers, but not of experts or of the head."""
        if self.rotate is None or kind != LINEAR or module.endswith(HEAD):
            return 0
        return next((size for size in ROTATIONS if size <= self.rotate and columns % size == 0), 0)

    def misfits(self, modules: Mapping[str, str], structure: Structure) -> Mapping[str, str]:
        """See `Int8Format.misfits`: modules that loaders fuse with one that stays in floating point."""
        fused: dict[str, list[str]] = {}
        experts: dict[str, list[str]] = {}
        for name in (*structure.linears, *structure.experts):
            if match := _FUSED.search(name):
                fused.setdefault(f"{name[: match.start()]}{match.lastgroup}", []).append(name)
            if match := _EXPERTS.match(name):
                experts.setdefault(match["layer"], []).append(name)
        found: dict[str, str] = {}
        for together, why in ((experts, "one of a layer's experts"), (fused, "a layer")):
            split = [names for names in together.values() if not modules.keys() >= set(names)]
            alone = [name for names in split for name in names if name in modules]
            found |= dict.fromkeys(alone, f"vLLM fuses it with {why} that stays in floating point")
        return found

    def outputs(self, plan: Plan, info: TensorInfo) -> list[OutTensor]:
        """See `Format.outputs`; gpt-oss has vLLM's names of experts, and groups have scales in the model's dtype."""
        tensors = super().outputs(plan, info)
        if plan.modules.get(info.name.rpartition(".")[0]) == PACKED_EXPERT:
            names = [_OURS.fullmatch(each.name) for each in tensors]
            tensors = [
                replace(each, name=f"{match['expert']}.{_IN_VLLM[match['part']]}_{match['rest']}") if match else each
                for each, match in zip(tensors, names, strict=True)
            ]
        if self.group_size is None or len(tensors) == 1:
            return tensors
        return [replace(each, dtype=plan.decoded_dtype) if each.name.endswith(SCALE) else each for each in tensors]

    def module_tensors(self, module: str, shape: tuple[int, int], kind: str) -> list[OutTensor]:
        """See `Int8Format.module_tensors`."""
        rows, columns = shape
        scale = OutTensor(f"{module}.{SCALE}", "F32", (rows, columns // self.group_size if self.group_size else 1))
        if not self._packs(kind):
            return [OutTensor(f"{module}.weight", "I8", shape), scale]
        tensors = [OutTensor(f"{module}.{PACKED}", "I32", (rows, -(-columns // _WORD))), scale]
        return [*tensors, OutTensor(f"{module}.{SHAPE}", "I64", (2,))] if self._has_shape(columns, kind) else tensors

    def pack(self, codes: Array, kind: str) -> Array:
        """See `Int8Format.pack`; packs four codes into each int32, the first in the lowest bits."""
        if not self._packs(kind):
            return codes
        rows, columns = codes.shape
        octets = np.zeros((rows, -(-columns // _WORD) * _WORD), np.uint8)
        np.add(codes.view(np.uint8), np.uint8(_OFFSET), out=octets[:, :columns])  # modulo 256: -127 becomes 1
        return octets.view("<i4")

    def scales(self, absmax: Array, shape: tuple[int, int], kind: str) -> list[Array]:
        """See `Int8Format.scales`."""
        scale = scale_of(absmax)[:, None]
        has_shape = self._packs(kind) and self._has_shape(shape[1], kind)
        return [scale, np.array(shape, np.int64)] if has_shape else [scale]

    def encode(self, plan: Plan, name: str, quantizer: WeightQuantizer) -> Pieces:
        """See `Format.encode`; scales by group are chosen on the CPU."""
        module = name.removesuffix(".weight")
        if self.group_size is None or module == name or module not in plan.modules:
            return (yield from super().encode(plan, name, quantizer))
        info, (weight, scale, *shape) = plan.checkpoint.tensors[name], plan.outputs[name]
        rows, columns = plan.shape_of(info)
        measured, parts = Measured(ColumnStats.empty(columns)), []
        for first_row, block in plan.blocks(info, None, STATS_TILE_ROWS):
            check_finite(block, info, first_row)
            values = np.ascontiguousarray(block, np.float32)
            codes, scales = self._groups(plan, info, first_row, values, DTYPES[scale.dtype])
            if not (fit := np.isfinite(scales.astype(np.float32)).all(axis=1)).all():
                raise cannot_hold(info, first_row + int(np.argmin(fit)), f"a scale in {scale.dtype}")
            measured.source.update(as_bytes(codes if plan.keeps_codes(name) else block))
            measured.add(values, groups.row_errors(values, codes, scales))
            parts.append(scales)
            yield Piece(weight.name, self.pack(codes, plan.modules[module]), block.nbytes)
        yield Piece(scale.name, np.concatenate(parts))
        for tensor in shape:
            yield Piece(tensor.name, np.array((rows, columns), np.int64))
        stats, peaks = measured.complete()
        found = summarize(
            stats,
            peaks,
            info.stored_dtype,
            measured.source.hexdigest(),
            False,
            rounding=NEAREST if plan.rounded is None else plan.rounded.rounding_of(name),
        )
        return {weight.name: found}

    def choose_scales(self, plan: Plan, name: str, values: Array, importance: Array) -> tuple[Array, Array]:
        """See `Format.choose_scales`."""
        if self.group_size is None:
            return super().choose_scales(plan, name, values, importance)
        dtype = DTYPES[next(each.dtype for each in plan.outputs[name] if each.name.endswith(SCALE))]
        _, scales = groups.quantize_rows(
            values,
            self.group_size,
            dtype,
            plan.checkpoint.tensors[name].stored_dtype in FLOAT4 and name not in plan.rotations,
        )
        return values, scales.astype(np.float32)

    def _groups(
        self, plan: Plan, info: TensorInfo, first_row: int, values: Array, dtype: np.dtype[Any]
    ) -> tuple[Array, Array]:
        """Codes int8 [n, K] and scales [n, G] of rows float32 [n, K]; codes of an int8 source are kept."""
        assert self.group_size is not None
        if plan.rounded is not None and info.name in plan.rounded:
            codes, scales = plan.rounded.rows(info.name, first_row, first_row + len(values))
            return codes, scales.astype(dtype)
        if not plan.keeps_codes(info.name):
            return groups.quantize_rows(
                values, self.group_size, dtype, info.stored_dtype in FLOAT4 and info.name not in plan.rotations
            )
        codes, absmax = plan.checkpoint.int8_rows(info.name, first_row, first_row + len(values))
        return codes, groups.carry_rows(absmax, values.shape[1] // self.group_size, dtype)

    def edit_config(self, config: dict[str, Any], plan: Plan) -> dict[str, Any]:
        """See `Format.edit_config`."""
        config_groups = self._config_groups(plan)
        formats = {group["format"] for group in config_groups.values()}
        is_expert = any(kind in (EXPERT, PACKED_EXPERT) for kind in plan.modules.values())
        # a quantizable layer in vLLM, but not in transformers
        routers = [rf"re:.*\{_ROUTER}$"] if is_expert else []
        fused = {name.rpartition(".")[0] for name, why in plan.kept.items() if why == FUSED_EXPERTS}
        experts = [f"re:{re.escape(module)}\\..*" for module in sorted(fused)]
        entry = {
            "quant_method": COMPRESSED_TENSORS,
            "format": "mixed-precision" if len(formats) > 1 else formats.pop(),
            "quantization_status": "compressed",  # with any other status, loaders read the codes as floats
            "ignore": sorted({*in_float(plan)}) + routers + experts,
            "kv_cache_scheme": None,
            "config_groups": config_groups,
        }
        if plan.rotations:
            entry["transform_config"] = _transform_config(plan)
        return {**config, "quantization_config": entry}

    def closed_to(self, modules: Mapping[str, str], structure: Structure, tensors: Collection[str]) -> dict[str, str]:
        """See `Format.closed_to`; transformers 5.23 fuses experts, and reads the weight of an embedding."""
        kinds, closed = {*modules.values()}, {}
        joins = structure.joinable and not structure.fusions and self._packs(EXPERT)
        if self.rotate is not None:
            closed["transformers"] = "it does not rotate inputs"
            biased = next((name for name in modules if f"{name}.bias" in tensors), "")
            if biased:  # vllm 0.32, compressed_tensors/transform/linear.py: assert bias is None
                closed["vllm"] = f"it cannot rotate the inputs of layers with a bias, such as {biased}"
        elif EMBEDDED in kinds:
            closed["transformers"] = "it cannot load an int8 embedding"
        elif kinds & {EXPERT, PACKED_EXPERT} and not joins:
            closed["transformers"] = "it needs experts as --moe transformers stores them"
        return closed

    def accepts(self, config: dict[str, Any], recipe: dict[str, Any]) -> bool:
        """See `Format.accepts`."""
        entry = config.get("quantization_config")
        return isinstance(entry, dict) and entry.get("quant_method") == self.name

    def _packs(self, kind: str) -> bool:
        always = (PACKED_EXPERT, EMBEDDED) if self.moe == "vllm" else (PACKED_EXPERT, EMBEDDED, EXPERT)
        return self.scheme == "w8a16" or kind in always

    def _has_shape(self, columns: int, kind: str) -> bool:
        """Whether a packed weight has a `weight_shape`, which vLLM's loader of gpt-oss takes for a weight."""
        return kind != PACKED_EXPERT or columns % _WORD != 0

    def _config_groups(self, plan: Plan) -> dict[str, Any]:
        """The config_groups. Loaders take the first group with a matching target, so the narrower come first."""
        named = [name for name, kind in plan.modules.items() if kind == EMBEDDED]
        experts = [kind for kind in plan.modules.values() if kind in (EXPERT, PACKED_EXPERT)]
        # vLLM's output head is no Linear layer by its class, and in a multimodal model it has another name
        heads = [rf"re:.*{HEAD}$"] if any(name.endswith(HEAD) for name in plan.modules) else []
        groups = [self._group(named, packed=True)] if named else []
        packed = [self._packs(kind) for kind in plan.modules.values() if kind != EMBEDDED]
        if any(packed) and not all(packed):
            groups.append(self._group([r"re:.*\.experts\..*"], packed=True))
        if len(packed) > len(experts) or not groups:
            groups.append(self._group([*heads, "Linear"], packed=all(packed)))
        return {f"group_{i}": group for i, group in enumerate(groups)}

    def _group(self, targets: list[str], packed: bool = False) -> dict[str, Any]:
        shared = {"num_bits": 8, "type": "int", "symmetric": True, "group_size": None}
        size = self.group_size
        grouped = {"strategy": "group", "group_size": size} if size else {"strategy": "channel"}
        return {
            "targets": targets,
            "format": "pack-quantized" if packed else "int-quantized",
            "weights": {**shared, **grouped, "dynamic": False},
            "input_activations": None if packed else {**shared, "strategy": "token", "dynamic": True},
            "output_activations": None,
            **({_GUARD: True} if self.rotate else {}),
        }


def _transform_config(plan: Plan) -> dict[str, Any]:
    """The transform_config of a plan with rotations: a scheme for each size of blocks."""
    by_size: dict[int, list[str]] = {}
    for name, size in plan.rotations.items():
        by_size.setdefault(size, []).append(name.removesuffix(".weight"))
    linears = {*plan.modules, *in_float(plan)}
    return {"config_groups": {f"rotate_{size}": _transform(size, names, linears) for size, names in by_size.items()}}


def _transform(size: int, names: list[str], linears: set[str]) -> dict[str, Any]:
    """The scheme that rotates the inputs of some modules in blocks.

    The same layer has other names in vLLM if the model takes images too. Therefore targets have the end of a name, from
    `layers.` on, with any number of the layer. Of the other modules, those that match are named as exceptions.
    """
    ends = {re.escape(_LAYER.sub("", name, count=1)) for name in names}
    patterns = sorted({".*" + re.sub(r"\d+", r"\\d+", end) + "$" for end in ends})
    matching = re.compile("|".join(patterns))
    modules = {
        "targets": [f"re:{pattern}" for pattern in patterns],
        "ignore": sorted(name for name in linears - {*names} if matching.match(name)),
    }
    return {
        "type": "hadamard",  # Sylvester's construction, divided by the square root of the size
        "apply": [
            {**modules, "location": "weight_input", "inverse": True},
            {**modules, "location": "input", "inverse": False},
        ],
        "randomize": False,
        "requires_grad": False,
        "head_dim": size,
        "precision": "torch.float32",
    }


@dataclass
class _Scaled(Encoding):
    """Integer or float8 numbers with scales: a weight is (number - zero point, if there is one) * scale."""

    bits: int = 0  # of a packed number; 0 if the numbers are not packed
    block: tuple[int, int] = (1, 1)  # rows and columns that share a scale

    def values(self, start: int, stop: int) -> Array:
        """The stored numbers of rows start..stop, as int8 or float8 [n, K]."""
        numbers = self.stored.rows(self.tensors[0], start, stop)
        return _signed(numbers, self.bits)[:, : self.shape[1]] if self.bits else numbers

    def rows(self, start: int, stop: int) -> Array:
        """See `Encoding.rows`."""
        values = self.scaled(start, stop)
        return cpu.rotate(values, self.rotation) if self.rotation else values

    def scaled(self, start: int, stop: int) -> Array:
        """Rows start..stop as stored, float32 [n, K]: rotated if the weight is."""
        down, across = self.block
        groups = np.arange(self.shape[1]) // across
        if (order := self.part(_ORDER)) is not None and order.min(initial=0) >= 0:  # all -1 if unused
            groups = order
        row_blocks = np.arange(start, stop) // down
        values = self.values(start, stop).astype(np.float32)
        if (zero := self.zero_points()) is not None:
            values -= zero.astype(np.float32).reshape(self.grid)[row_blocks][:, groups]
        scale = self.whole(f"{self.module}.{SCALE}").astype(np.float32)
        values *= scale.reshape(self.grid)[row_blocks][:, groups]
        return values

    @property
    def grid(self) -> tuple[int, int]:
        """Number of scales along the rows and along the columns."""
        down, across = (*self.stored.tensors[f"{self.module}.{SCALE}"].shape, 1, 1)[:2]
        return down, across

    def part(self, name: str) -> Array | None:
        """A tensor of the module by the last part of its name, or None if the module does not have it."""
        full = f"{self.module}.{name}"
        return self.whole(full) if full in self.tensors else None

    def zero_points(self) -> Array | None:
        """The zero points, in the shape of the scales; None if there are none.

        If the weight is packed, its zero points are packed too, but along the rows.
        """
        zero = self.part(_ZERO)
        if zero is None or not self.bits:
            return zero
        points: Array = _signed(np.ascontiguousarray(zero.T), self.bits)[:, : self.grid[0]].T
        return points


class _RowwiseInt8(_Scaled, RowwiseInt8):
    """Symmetric int8 with one scale per row or per tensor."""

    def codes(self, start: int, stop: int) -> Array:
        return self.values(start, stop)

    def absmax(self, start: int, stop: int) -> Array:
        scale = self.whole(f"{self.module}.{SCALE}").reshape(-1)
        return absmax_of(np.broadcast_to(scale, self.shape[0])[start:stop])


class _Float4(Float4):
    """4-bit floats; the scale of the tensor is a divisor."""

    def times_global(self, scales: Array) -> Array:
        """See `Float4.times_global`."""
        factors: Array = scales / self.global_scale(f"{self.module}.{_GLOBAL}")
        return factors


class _GroupwiseInt8(_Scaled, GroupwiseInt8):
    """Symmetric int8 with one scale per group of columns, all groups of one size."""

    def codes(self, start: int, stop: int) -> Array:
        return self.values(start, stop)

    def scales(self, start: int, stop: int) -> Array:
        scales: Array = self.whole(f"{self.module}.{SCALE}")[start:stop].astype(np.float32)
        return scales


def with_module_names(stored: Checkpoint) -> Checkpoint:
    """The checkpoint with the experts of gpt-oss by the names of modules, such as `experts.0.gate_up_proj.weight`."""
    parts = {theirs: ours for ours, theirs in _IN_VLLM.items()}
    matches = [match for name in stored.tensors if (match := _THEIRS.fullmatch(name))]
    names = {f"{match['expert']}.{parts[match['part']]}.{match['rest']}": match[0] for match in matches}
    return Renamed(stored, names) if names else stored


def find(stored: Checkpoint, entry: dict[str, Any]) -> dict[str, Encoding]:
    """Find the modules that have scales.

    Args:
        stored: The checkpoint as it is stored.
        entry: The quantization_config of its config.json.

    Returns:
        The encoding of each module, by module name.

    Raises:
        SourceError: The format is not among those that are read, the weights are sparse or rotated, or the tensors of a
            module do not fit together.
    """
    where = str(stored.folder)
    require(entry, {"quantization_status": ("compressed",)}, where)
    sparse = entry.get("sparsity_config") or {}
    if not isinstance(sparse, dict) or sparse.get("format", "dense") != "dense":
        raise SourceError(f"{where}: is compressed with a sparsity_config, which is not read; use the original one")
    arguments, rotations = _weight_arguments(entry, where), _rotations(entry, where)
    for info in stored.tensors.values():
        module, _, part = info.name.rpartition(".")
        if part in (PACKED, _GLOBAL) and f"{module}.{SCALE}" not in stored.tensors:
            where = f"{stored.folder / info.file}: {info.name}"
            raise SourceError(f"{where} has no {SCALE} beside it; fetch the checkpoint again")
    modules = [name.removesuffix(f".{SCALE}") for name in stored.tensors if name.endswith(f".{SCALE}")]
    return {name: _module(stored, name, arguments, rotations) for name in modules}


def unused(name: str) -> bool:
    """Whether a tensor is for quantized activations or key-value caches, which no other format here supports."""
    return name.endswith(_CACHE_SCALES) or name.rpartition(".")[2] in _UNUSED


def _weight_arguments(entry: dict[str, Any], where: str) -> list[dict[str, Any]]:
    groups = entry.get("config_groups")
    if not isinstance(groups, dict) or not all(isinstance(group, dict) for group in groups.values()):
        raise SourceError(f"{where}: its quantization_config has no config_groups; fetch it again")
    for group in (entry, *groups.values()):
        if group.get("format") not in (None, *_FORMATS):
            raise SourceError(
                f"{where}: is {group['format']}, which is not read (only {', '.join(_FORMATS)}); "
                "use the original checkpoint"
            )
    arguments = [group["weights"] for group in groups.values() if isinstance(group.get("weights"), dict)]
    for given in arguments:
        size, block = given.get("group_size"), given.get("block_structure")
        sizes = [*([] if size is None else [size]), *(block if isinstance(block, list) else [1, 1])]
        if not all(type(number) is int for number in sizes) or not 2 <= len(sizes) <= 3:
            raise SourceError(
                f"{where}: its group_size {size!r} or block_structure {block!r} is not a size; fetch config.json again"
            )
    return arguments


def _rotations(entry: dict[str, Any], where: str) -> list[_Rotation]:
    """What a transform_config does to inputs at run time. What it did to weights alone is part of them already."""
    asked = entry.get("transform_config") or {}
    groups = asked.get("config_groups") or {} if isinstance(asked, dict) else None
    found = []
    try:
        schemes: Any = groups.values()  # type: ignore[union-attr]
        for scheme in schemes:
            for each in scheme["apply"]:
                if each["location"] in ("weight_input", "weight_output"):
                    continue
                plain = scheme["type"] == "hadamard" and not scheme.get("randomize") and each["location"] == "input"
                if not plain or scheme.get("head_dim") not in ROTATIONS:
                    raise SourceError(
                        f"{where}: its transform_config has a {scheme['type']} transform of {each['location']} that is "
                        f"not read (only hadamard in blocks of {', '.join(map(str, ROTATIONS))}); use the original "
                        "checkpoint"
                    )
                found.append(_Rotation(scheme["head_dim"], [*each["targets"]], [*each.get("ignore", [])]))
    except (KeyError, TypeError, AttributeError):
        raise SourceError(f"{where}: its transform_config is not valid; fetch config.json again") from None
    return found


class _Rotation(NamedTuple):
    """A rotation of the inputs of some Linear layers, in blocks of `size` features."""

    size: int
    targets: list[str]  # names of modules, "re:" and a pattern, or "Linear" for all
    ignore: list[str]

    def applies(self, module: str) -> bool:
        """Whether the inputs of a Linear layer are rotated."""
        return _is_match(module, self.targets) and not _is_match(module, self.ignore)


def _is_match(module: str, targets: list[str]) -> bool:
    """Whether targets name a Linear layer, as compressed-tensors matches them."""
    patterns = [target.removeprefix("re:") for target in targets if target.startswith("re:")]
    return module in targets or "Linear" in targets or any(re.match(pattern, module) for pattern in patterns)


def _module(stored: Checkpoint, module: str, arguments: list[dict[str, Any]], rotations: list[_Rotation]) -> Encoding:
    names = tuple(f"{module}.{part}" for part in (SCALE, SHAPE, _ZERO, _ORDER))
    values = next((name for name in (f"{module}.{PACKED}", f"{module}.weight") if name in stored.tensors), None)
    if values is None:
        file = stored.folder / stored.tensors[names[0]].file
        raise SourceError(f"{file}: {module} has {SCALE} but no weight; fetch the folder again")
    tensors = (values, *(name for name in names if name in stored.tensors))
    info = stored.tensors[values]
    found = [each.size for each in rotations if each.applies(module)]
    rotation = found[0] if found else 0
    rows, columns = (*info.shape, 0, 0)[:2]
    encoding = _Scaled(stored, module, tensors, (rows, columns), rotation)
    if values.endswith(PACKED) and info.dtype == PACKED_TYPE:
        if rotation:
            raise encoding.refuse("has 4-bit floats that are rotated, which is not read")
        return _float4(stored, module)
    packed = values.endswith(PACKED)
    if len(info.shape) != 2 or info.dtype not in (("I32",) if packed else _VALUES):
        raise encoding.refuse(f"stores its weight as {info.dtype} {list(info.shape)}, which is not read")
    if packed:
        _read_packed_shape(encoding, arguments)
    _read_blocks(encoding, arguments)
    _check_parts(encoding)
    if len(found) > 1:
        raise encoding.refuse("has two rotations of its input, which is not read")
    if rotation and encoding.shape[1] % rotation:
        raise encoding.refuse(f"has {encoding.shape[1]} columns, which blocks of {rotation} do not divide")
    zero = names[2] in tensors and bool(encoding.zero_points().any())  # type: ignore[union-attr]
    encoding.release()
    if zero or not (encoding.bits == 8 or info.dtype == "I8"):
        return encoding
    down, across = encoding.block
    known: dict[str, Any] = {"rotation": rotation, "bits": encoding.bits, "block": encoding.block}
    if encoding.block in ((1, encoding.shape[1]), encoding.shape):
        return _RowwiseInt8(stored, module, tensors, encoding.shape, **known)
    if down == 1 and encoding.shape[1] % across == 0 and names[3] not in tensors:
        return _GroupwiseInt8(stored, module, tensors, encoding.shape, **known)
    return encoding


def _float4(stored: Checkpoint, module: str) -> Encoding:
    parts = (f"{module}.{part}" for part in (PACKED, SCALE, _GLOBAL, _ZERO))
    names = tuple(name for name in parts if name in stored.tensors)
    kind = MXFP4 if stored.tensors[names[1]].dtype in E8M0_TYPES else NVFP4
    encoding = _Float4(stored, module, names, stored.tensors[names[0]].shape, kind=kind)
    if names[-1].endswith(_ZERO):
        raise encoding.refuse("has zero points, which 4-bit floats are not read with")
    encoding.check_parts(f"{module}.{_GLOBAL}")
    return encoding


def _read_packed_shape(encoding: _Scaled, arguments: list[dict[str, Any]]) -> None:
    """Set the shape and bit width of packed numbers from weight_shape and the config's num_bits."""
    rows, words = encoding.shape
    shape = encoding.part(SHAPE)
    if shape is None and _EXPERTS.match(encoding.module):  # of gpt-oss: all words are full
        shape = np.array((rows, words * _WORD))
    if shape is None or shape.shape != (2,) or int(shape[0]) != rows:
        raise encoding.refuse(f"has no {SHAPE} [N, K] that matches its weight")
    columns = int(shape[1])
    for bits in _PACKED_BITS:
        if any(given.get("num_bits") == bits for given in arguments) and words == -(-columns * bits // 32):
            encoding.shape, encoding.bits = (rows, columns), bits
            return
    raise encoding.refuse(f"packs {columns} columns into {words} words, which matches no num_bits of config.json")


def _read_blocks(encoding: _Scaled, arguments: list[dict[str, Any]]) -> None:
    """Set how many rows and columns share a scale.

    This follows from the shapes, unless the last block along a dimension is smaller; then it is taken from the config.
    """
    (rows, columns), scale = encoding.shape, encoding.stored.tensors[f"{encoding.module}.{SCALE}"].shape
    if scale in ((), (1,), (1, 1)):
        encoding.block = (max(1, rows), max(1, columns))
        return
    down, across = (*scale, 1)[:2]
    candidates = [(1, columns if across == 1 else columns // max(1, across))]
    candidates += [(1, given["group_size"]) for given in arguments if given.get("group_size")]
    candidates += [
        tuple(given["block_structure"]) for given in arguments if isinstance(given.get("block_structure"), list)
    ]
    for block in candidates:
        if min(block) > 0 and (-(-rows // block[0]), -(-columns // block[1])) == (down, across):
            encoding.block = block
            return
    raise encoding.refuse(f"is {rows}x{columns} with scales {list(scale)}, which do not fit")


def _check_parts(encoding: _Scaled) -> None:
    """Raise SourceError if the shape, dtype or groups of scales, zero points or g_idx do not fit the weight."""
    tensors, (down, across), bits = encoding.stored.tensors, encoding.grid, encoding.bits
    scale = tensors[f"{encoding.module}.{SCALE}"]
    if scale.dtype not in FLOATING or len(scale.shape) > 2:
        raise encoding.refuse(f"has {scale.dtype} scales {list(scale.shape)}, which are not read")
    zero = tensors.get(f"{encoding.module}.{_ZERO}")
    wanted = (-(-down * bits // 32), across) if bits else (down, across)
    short = [] if bits else [wanted[:i] for i in range(2) if math.prod(wanted[i:]) == 1]  # may have fewer dimensions
    if zero is not None and (zero.shape not in (wanted, *short) or (bits and zero.dtype != "I32")):
        raise encoding.refuse(f"has zero points {zero.dtype} {list(zero.shape)} for {down}x{across} scales")
    order = tensors.get(f"{encoding.module}.{_ORDER}")
    if order is not None:
        fits = order.dtype in ("I32", "I64") and order.shape == encoding.shape[1:]
        if not fits or (values := encoding.whole(order.name)).max(initial=-1) >= across or values.min(initial=0) < -1:
            raise encoding.refuse(f"has a {_ORDER} that does not fit its {across} groups")


def _signed(packed: Array, bits: int) -> Array:
    """Unpack signed int8 numbers from int32 words."""
    values: Array = (unpack_int32(packed, bits).astype(np.int16) - 2 ** (bits - 1)).astype(np.int8)
    return values
