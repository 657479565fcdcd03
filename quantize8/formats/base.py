"""What an output format decides: which modules become int8, the bytes of every tensor, their places, and config.json.

A format is a small immutable object. A conversion asks it three things: `lay_out`, the tensors and weight files that
it makes of a checkpoint, from headers alone; `encode`, the bytes of those tensors, block by block; and `edit_config`.
Everything else of a conversion (order, threads, journals, destinations) is the same for all formats.
"""

from __future__ import annotations

import json
import math
import re
from abc import ABC, abstractmethod
from collections.abc import Generator, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol

import numpy as np
from blake3 import blake3

from quantize8.artifact.manifest import Quantized, summarize
from quantize8.errors import OutputError, WeightError
from quantize8.formats import COMPRESSED_TENSORS, DEFAULT_FORMAT, FORMATS, GGUF, MOE_LOADERS, SCHEMES
from quantize8.kernels import ABSMAX, MSE, cpu
from quantize8.kernels.cpu import CpuQuantizer
from quantize8.kernels.q8_0 import BLOCK, BLOCK_BYTES, Q8_0
from quantize8.kernels.reference import FLOAT16_MAX, STATS_TILE_ROWS, Array, ColumnStats, as_bytes, dequantize
from quantize8.sources.base import DTYPES, FLOATING, TensorInfo
from quantize8.sources.safetensors import INDEX_NAME, SINGLE_NAME

if TYPE_CHECKING:
    from quantize8.conversion.plan import Plan
    from quantize8.sources.structure import Structure

# The order in which the safetensors library writes tensors: wide dtypes first, so that all stay aligned.
_DTYPE_ORDER = [*("U64", "I64", "F64", "F32", "U32", "I32", "BF16", "F16", "U16", "I16")]
_DTYPE_ORDER += ["F8_E8M0", "F8_E4M3", "F8_E5M2", "I8", "U8", "BOOL"]
_SIZE_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_PARAMETERS = ("weight", "bias")  # last names of the tensors that a layer computes with
_OVERWRITE = "with --overwrite for the same --out"  # where an unfinished artifact of the failed attempt may lie


@dataclass(frozen=True)
class OutTensor:
    """A tensor to be written. `dtype` is its safetensors name, or Q8_0 in a GGUF file."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Size of the values in bytes."""
        count = math.prod(self.shape)
        return count // BLOCK * BLOCK_BYTES if self.dtype == Q8_0 else count * DTYPES[self.dtype].itemsize


@dataclass(frozen=True)
class Shard:
    """One weight file, known before any of it is written.

    Attributes:
        file: Its name in the artifact.
        tensors: Its tensors in the order in which they are stored.
        header: The first bytes of the file.
        offsets: Tensor name -> its first byte, from the start of the file.
        nbytes: Size of the whole file in bytes.
    """

    file: str
    tensors: list[OutTensor]
    header: bytes = b""
    offsets: dict[str, int] = field(default_factory=dict)
    nbytes: int = 0


class Layout(NamedTuple):
    """What a format makes of a checkpoint: source tensor -> the tensors that it becomes, and the files they are in."""

    outputs: Mapping[str, list[OutTensor]]
    shards: list[Shard]


class Piece(NamedTuple):
    """The next bytes of a tensor of the artifact; `read` is how many bytes of the source they took."""

    tensor: str
    values: Array
    read: int = 0


Pieces = Generator[Piece, None, Quantized | None]  # returns what quantizing did to the first of the tensors


class WeightQuantizer(Protocol):
    """Quantizes the rows of a weight to int8; one instance serves one thread at a time."""

    @property
    def block_bytes(self) -> int | None:
        """How many bytes of weight it takes at a time; None for the checkpoint's own block size."""

    def quantize(self, blocks: Iterator[Array], stats: ColumnStats) -> Iterator[tuple[Array, Array, Array]]:
        """Yield (block, codes, absmax) for each block [n, K]; `stats` is complete after the last one."""


@dataclass(frozen=True)
class Format(ABC):
    """An output format.

    Attributes:
        name: What `--format` calls it.
        suffix: The end of the default name of an artifact's folder.
        options: The options of `convert` that this format has a place for, of recipe, threshold, calibrate and scale.
        is_folder: Whether an artifact is a transformers model folder, with config.json and tokenizer files.
        loaders: What opens an artifact, the best first: keys of `artifact.card`'s instructions.
        package: What transformers needs besides itself to open it.
    """

    name: str
    suffix: str
    options: ClassVar[frozenset[str]] = frozenset()
    is_folder: ClassVar[bool] = True
    loaders: ClassVar[tuple[str, ...]] = ("transformers", "quantize8")
    package: ClassVar[str] = ""

    @property
    def title(self) -> str:
        """The name with the chosen variant of the format."""
        return self.name

    def lay_out(self, plan: Plan, max_shard_size: str) -> Layout:
        """Decide the output tensors and the place of every byte of them, from headers alone."""
        outputs = {info.name: self.outputs(plan, info) for info in plan.checkpoint.tensors.values()}
        return Layout(outputs, plan_shards(outputs.values(), max_shard_size))

    def outputs(self, plan: Plan, info: TensorInfo) -> list[OutTensor]:
        """The tensors that a source tensor becomes: by default itself, in the model's dtype if it is decoded."""
        dtype = plan.decoded_dtype if info.name in plan.checkpoint.decoded else info.dtype
        return [OutTensor(info.name, dtype, plan.shape_of(info))]

    def quantizes(self, plan: Plan) -> list[str]:
        """Source tensors that become int8."""
        return [f"{name}.weight" for name in plan.modules]

    def encode(self, plan: Plan, name: str, quantizer: WeightQuantizer) -> Pieces:
        """Yield the bytes of all tensors that a source tensor becomes, each tensor's in order.

        Raises:
            WeightError: The values hold NaN, or a magnitude that the output's dtype cannot hold.
        """
        info = plan.checkpoint.tensors[name]
        (out,) = plan.outputs[name]
        for first_row, block in plan.blocks(info):
            if info.dtype in FLOATING:
                check_finite(block, info, first_row)
            values = block if out.dtype == info.dtype else _rounded(block, out, info, first_row)
            yield Piece(out.name, values, block.nbytes)
        return None

    @abstractmethod
    def edit_config(self, config: dict[str, Any], plan: Plan) -> dict[str, Any]:
        """The artifact's config.json, from the source's without its quantization."""

    def accepts(self, config: dict[str, Any], recipe: dict[str, Any]) -> bool:
        """Whether a config.json is one that `edit_config` writes for this recipe, as the manifest has it."""
        return config.get("quantization_config") is None


class Int8Format(Format):
    """A format that holds int8 codes with one scale for each row."""

    options: ClassVar[frozenset[str]] = frozenset({"recipe", "calibrate", "scale"})

    @abstractmethod
    def linears(self, structure: Structure) -> tuple[dict[str, str], dict[str, str]]:
        """The modules that this format can hold in int8 -> their kind, and those that it cannot -> why."""

    @abstractmethod
    def misfits(self, modules: Mapping[str, str], structure: Structure) -> Mapping[str, str]:
        """Of these int8 modules, those that must stay in floating point because others do -> why."""

    @abstractmethod
    def module_tensors(self, module: str, shape: tuple[int, int], kind: str) -> list[OutTensor]:
        """Tensors of an int8 module with a weight [N, K], the codes first."""

    def pack(self, codes: Array, kind: str) -> Array:
        """Codes int8 [n, K] as the first of `module_tensors` holds them."""
        return codes

    @abstractmethod
    def scales(self, absmax: Array, shape: tuple[int, int], kind: str) -> list[Array]:
        """Values of the other `module_tensors`, in their order, for absmax float32 [N]."""

    def outputs(self, plan: Plan, info: TensorInfo) -> list[OutTensor]:
        """See `Format.outputs`: the weight of an int8 module becomes that module's tensors."""
        module = info.name.removesuffix(".weight")
        if module == info.name or module not in plan.modules:
            return super().outputs(plan, info)
        rows, columns = plan.shape_of(info)
        return self.module_tensors(module, (rows, columns), plan.modules[module])

    def encode(self, plan: Plan, name: str, quantizer: WeightQuantizer) -> Pieces:
        """See `Format.encode`: quantize an int8 module's weight [N, K], or carry over the codes it is stored as."""
        module = name.removesuffix(".weight")
        if module == name or module not in plan.modules:
            return (yield from super().encode(plan, name, quantizer))
        info, kind, calibrated = plan.checkpoint.tensors[name], plan.modules[module], plan.calibrated.get(module)
        weight, *others = plan.outputs[name]
        rows, columns = plan.shape_of(info)
        stats, source = ColumnStats.empty(columns), blake3()
        absmax: list[Array] = []
        exact: list[Array] = []
        if search := plan.searches.get(name):
            quantizer = CpuQuantizer(search)
        blocks = (block for _, block in plan.blocks(info, quantizer.block_bytes, STATS_TILE_ROWS))
        for values, codes, peaks in _carried(plan, info, stats) if info.is_int8 else quantizer.quantize(blocks, stats):
            source.update(as_bytes(codes if info.is_int8 else values))
            if not np.isfinite(peaks).all():
                raise _unfit(values, peaks, info, sum(map(len, absmax)))
            absmax.append(peaks)
            if calibrated is not None:
                exact.append(calibrated.exact_rows(values))
            yield Piece(weight.name, self.pack(codes, kind), values.nbytes)
        scales = np.concatenate(absmax)
        for tensor, array in zip(others, self.scales(scales, (rows, columns), kind), strict=True):
            yield Piece(tensor.name, array)
        if calibrated is not None:
            arrays = [*calibrated.values(), np.concatenate(exact)]
            for tensor, array in zip(calibrated.tensors(module, rows), arrays, strict=True):
                yield Piece(tensor.name, array)
        return summarize(
            stats, scales, plan.checkpoint.tensors[name].stored_dtype, source.hexdigest(), name in plan.transposed,
            MSE if name in plan.searches else ABSMAX,
        )  # fmt: skip


def make_format(name: str, scheme: str | None = None, moe: str | None = None) -> Format:
    """The format that `--format` names, with the `--scheme` and `--moe` of compressed-tensors.

    Raises:
        OutputError: The name is unknown, or the format does not have one of the options.
    """
    options = {"scheme": (scheme, SCHEMES), "moe": (moe, MOE_LOADERS)}
    for option, (value, known) in options.items():
        if value is not None and value not in known:
            raise OutputError(f"{option} {value}: unknown; name one of {', '.join(known)}")
        if value is not None and name != COMPRESSED_TENSORS:
            raise OutputError(f"{option} {value}: belongs to --format compressed-tensors; leave it out, or name that")
    if name == COMPRESSED_TENSORS:
        from quantize8.formats.compressed_tensors import CompressedTensors

        given = {option: value for option, (value, _) in options.items() if value is not None}
        return CompressedTensors(suffix=scheme or SCHEMES[0], **given)  # type: ignore[arg-type]
    if name == DEFAULT_FORMAT:
        from quantize8.formats.bitsandbytes import BitsAndBytes

        return BitsAndBytes()
    if name == GGUF:
        from quantize8.formats.gguf.writer import Gguf  # the gguf package takes a while to import

        return Gguf()
    if name in FORMATS:
        from quantize8.formats.floating import Floating

        return Floating(name, name)
    raise OutputError(f"format {name}: unknown; name one of {', '.join(FORMATS)}")


def in_float(plan: Plan) -> Iterable[str]:
    """Modules with a matrix that stays in floating point, by the names of the checkpoint and of the model."""
    for info in plan.checkpoint.tensors.values():
        module = info.name.removesuffix(".weight")
        if len(info.shape) == 2 and module != info.name and module not in plan.modules:
            yield module
    yield from plan.skip_list


def plan_shards(groups: Iterable[list[OutTensor]], max_shard_size: str) -> list[Shard]:
    """Fill files in order up to `max_shard_size`; the tensors of a group (one module's) stay together."""
    limit, size = parse_size(max_shard_size), 0
    files: list[list[OutTensor]] = [[]]
    for group in groups:
        nbytes = sum(tensor.nbytes for tensor in group)
        if files[-1] and size + nbytes > limit:
            files.append([])
            size = 0
        files[-1] += group
        size += nbytes
    count = len(files)
    names = [f"model-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)] if count > 1 else [SINGLE_NAME]
    return [place(name, tensors) for name, tensors in zip(names, files, strict=True)]


def place(file: str, tensors: Iterable[OutTensor]) -> Shard:
    """A safetensors file of these tensors, in the order of the safetensors library: wide dtypes first, then by name."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}  # transformers asks for the format
    ordered = sorted(tensors, key=lambda tensor: (_DTYPE_ORDER.index(tensor.dtype), tensor.name))
    starts, position = {}, 0
    for tensor in ordered:
        starts[tensor.name], end = position, position + tensor.nbytes
        entries[tensor.name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [position, end]}
        position = end
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(8, "little") + text
    offsets = {name: start + len(header) for name, start in starts.items()}
    return Shard(file, ordered, header, offsets, len(header) + position)


def index(shards: list[Shard], always: bool = False) -> dict[str, bytes]:
    """The index of several files, as transformers writes it: {file name: content}.

    A single file has no index, except with `always`: loaders read every *.safetensors file where there is no index.
    """
    if len(shards) == 1 and not always:
        return {}
    weight_map = {tensor.name: shard.file for shard in shards for tensor in shard.tensors}
    total = sum(tensor.nbytes for shard in shards for tensor in shard.tensors)
    value = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    return {INDEX_NAME: json.dumps(value, indent=2).encode() + b"\n"}


def parse_size(text: str) -> int:
    """A size in bytes, such as 5GB (10^9) or 512MiB (2^20)."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]?I?B?)", text.strip().upper())
    if match is None or match[2] not in _SIZE_UNITS or float(match[1]) * _SIZE_UNITS[match[2]] < 1:
        raise OutputError(f"max-shard-size {text!r}: not a size; write for example 5GB or 500MB")
    return int(float(match[1]) * _SIZE_UNITS[match[2]])


def check_finite(block: Array, info: TensorInfo, first_row: int) -> None:
    """Refuse NaN in any tensor, and infinity in weights and biases; a mask may hold -inf.

    Raises:
        WeightError: With the file, the tensor and the row.
    """
    is_parameter = info.name.rpartition(".")[2] in _PARAMETERS
    if not cpu.all_finite(block) and (is_parameter or np.isnan(block).any()):
        finite = np.isfinite(block).reshape(len(block) if block.ndim else 1, -1).all(axis=1)
        row = first_row + int(np.argmin(finite))
        raise WeightError(f"{info.file}: {info.name} row {row} holds NaN or infinity; repair or replace the checkpoint")


def cannot_hold(info: TensorInfo, row: int, holder: str) -> WeightError:
    """The error for a row with a magnitude that the output's number format cannot hold."""
    return WeightError(
        f"{info.file}: {info.name} row {row} holds a magnitude that {holder} cannot; choose another --format, "
        f"{_OVERWRITE}"
    )


def _carried(plan: Plan, info: TensorInfo, stats: ColumnStats) -> Iterator[tuple[Array, Array, Array]]:
    """Blocks [n, K] of an int8 source dequantized, with their codes int8 [n, K] as they are and absmax [n].

    Statistics describe the dequantized values; there is no error, except in rows that hold the code -128.
    """
    errors = np.zeros_like(stats.sum_error)
    for first_row, block in plan.blocks(info, None, STATS_TILE_ROWS):
        codes, absmax = plan.checkpoint.int8_rows(info.name, first_row, first_row + len(block))
        cpu.quantize_rowwise(block, stats)
        difference = block - dequantize(codes, absmax)
        if difference.any():
            errors += np.square(difference).sum(axis=0, dtype=np.float64)
        stats.sum_error[:] = errors
        yield block, codes, absmax


def _rounded(block: Array, out: OutTensor, info: TensorInfo, first_row: int) -> Array:
    """Values in the output's dtype; raises WeightError where it cannot hold their magnitude."""
    with np.errstate(over="ignore"):
        values = np.ascontiguousarray(block, np.float32).astype(DTYPES[out.dtype])
    if cpu.all_finite(values):
        return values
    fits = (np.isfinite(values) | ~np.isfinite(block)).reshape(len(values) if values.ndim else 1, -1).all(axis=1)
    if not fits.all():
        raise cannot_hold(info, first_row + int(np.argmin(fits)), out.dtype)
    return values


def _unfit(values: Array, absmax: Array, info: TensorInfo, first_row: int) -> WeightError:
    """The error for the first row that cannot be quantized: NaN and infinity, or too large for float16."""
    row = int(np.argmin(np.isfinite(absmax)))
    where = f"{info.file}: {info.name} row {first_row + row}"
    magnitudes: Any = np.abs(values[row].astype(np.float32))
    if np.isfinite(magnitudes).all():
        return WeightError(
            f"{where} holds |w| = {magnitudes.max():g}, over float16's {FLOAT16_MAX:g}, which int8 here starts from; "
            f"keep it in floating point by a recipe with skip = [{info.name.removesuffix('.weight')!r}], {_OVERWRITE}"
        )
    return WeightError(f"{where} holds NaN or infinity; repair or replace the checkpoint")
