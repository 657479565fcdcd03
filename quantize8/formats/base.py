"""The interface of output formats, which decide what becomes int8, how tensors are stored, and config.json.

A format is a small immutable object with three main methods: `lay_out` plans the output tensors and weight files from
the checkpoint's headers alone, `encode` produces the bytes of those tensors block by block, and `edit_config` writes
config.json. The rest of a conversion (order, threads, journals, destinations) is the same for all formats.
"""

from __future__ import annotations

import json
import math
import re
from abc import ABC, abstractmethod
from collections.abc import Collection, Generator, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol

import numpy as np
from blake3 import blake3

from quantize8.artifact.manifest import Quantized, summarize
from quantize8.errors import OutputError, WeightError
from quantize8.formats import (
    COMPRESSED_TENSORS,
    DEFAULT_FORMAT,
    FORMATS,
    GGUF,
    GROUP_SIZES,
    GROUPED_SCHEME,
    MOE_LOADERS,
    SCHEMES,
)
from quantize8.kernels import ABSMAX, MSE, NEAREST, ROTATIONS, cpu
from quantize8.kernels.cpu import CpuQuantizer
from quantize8.kernels.q8_0 import BLOCK, BLOCK_BYTES, Q8_0
from quantize8.kernels.reference import (
    FLOAT16_MAX,
    STATS_TILE_ROWS,
    Array,
    ColumnStats,
    absmax_of,
    as_bytes,
    dequantize,
    scale_of,
    to_float16,
)
from quantize8.kernels.scales import ScaleSearch
from quantize8.sources.base import DTYPES, FLOAT4, FLOATING, TensorInfo
from quantize8.sources.safetensors import INDEX_NAME, SINGLE_NAME

if TYPE_CHECKING:
    from quantize8.conversion.plan import Plan
    from quantize8.conversion.rounding import RoundedWeights
    from quantize8.sources.structure import Structure

# The order in which the safetensors library writes tensors: wide dtypes first, so that every tensor is aligned.
_DTYPE_ORDER = [*("U64", "I64", "F64", "F32", "U32", "I32", "BF16", "F16", "U16", "I16")]
_DTYPE_ORDER += ["F8_E8M0", "F8_E4M3", "F8_E5M2", "I8", "U8", "BOOL"]
_SIZE_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_PARAMETERS = ("weight", "bias")  # last name components of the tensors that a layer computes with
_OVERWRITE = "with --overwrite for the same --out"  # the failed attempt may have left an unfinished artifact there


@dataclass(frozen=True)
class OutTensor:
    """A tensor to be written. `dtype` is a safetensors dtype name, or Q8_0 in a GGUF file."""

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
    """The layout of one weight file, which is known before any of it is written.

    Attributes:
        file: Name of the file in the artifact.
        tensors: The tensors of the file in storage order.
        header: The header, with which the file begins.
        offsets: Tensor name -> offset of its first byte from the start of the file.
        nbytes: Size of the whole file in bytes.
    """

    file: str
    tensors: list[OutTensor]
    header: bytes = b""
    offsets: dict[str, int] = field(default_factory=dict)
    nbytes: int = 0


class Layout(NamedTuple):
    """The output of a conversion: source tensor -> the output tensors made from it, and the files that hold them."""

    outputs: Mapping[str, list[OutTensor]]
    shards: list[Shard]


class Piece(NamedTuple):
    """The next bytes of an output tensor; `read` is the number of source bytes that were read to produce them."""

    tensor: str
    values: Array
    read: int = 0


Pieces = Generator[Piece, None, Mapping[str, Quantized]]  # returns statistics by name of the output tensor


@dataclass
class Measured:
    """Statistics of a weight whose scales are not by row, collected block by block."""

    stats: ColumnStats
    source: Any = field(default_factory=blake3)  # digest of the values as read
    peaks: list[Array] = field(default_factory=list)
    squares: list[Array] = field(default_factory=list)
    errors: list[Array] = field(default_factory=list)

    def add(self, values: Array, sums: tuple[Array, Array]) -> None:
        """Add rows, float32 [n, K], and the sums of their squares and of those of their errors, float64 [n]."""
        cpu.quantize_rowwise(values, self.stats)
        self.peaks.append(np.abs(values).max(axis=1, initial=0))
        self.squares.append(sums[0])
        self.errors.append(sums[1])

    def complete(self) -> tuple[ColumnStats, Array]:
        """Return the statistics, with squares and errors by row, and the absmax of each row."""
        self.stats.sum_square, self.stats.sum_error = np.concatenate(self.squares), np.concatenate(self.errors)
        return self.stats, np.concatenate(self.peaks)


class WeightQuantizer(Protocol):
    """Quantizes the rows of a weight to int8; one instance serves one thread at a time."""

    @property
    def block_bytes(self) -> int | None:
        """Size in bytes of the weight blocks it works on; None for the checkpoint's default block size."""

    def quantize(self, blocks: Iterator[Array], stats: ColumnStats) -> Iterator[tuple[Array, Array, Array]]:
        """Quantize the rows of a weight block by block.

        Args:
            blocks: Consecutive blocks [n, K] of the weight's rows.
            stats: Statistics by input column, which are updated and complete after the last block.

        Yields:
            Each block [n, K] with its codes, int8 [n, K], and the absmax of its rows, float32 [n].
        """


@dataclass(frozen=True)
class Format(ABC):
    """An output format.

    Attributes:
        name: Its name for `--format`.
        suffix: Suffix of the default name of the output folder.
        is_folder: Whether an artifact is a transformers model folder, with config.json and tokenizer files.
        loaders: Programs that open an artifact, the recommended one first: keys of `artifact.card`'s instructions.
        package: Additional package that transformers needs to open an artifact; empty for none.
        holds_embeddings: Whether the input embedding can be int8, as kind EMBEDDED.
    """

    name: str
    suffix: str
    is_folder: ClassVar[bool] = True
    loaders: ClassVar[tuple[str, ...]] = ("transformers", "quantize8")
    package: ClassVar[str] = ""
    holds_embeddings: ClassVar[bool] = False

    @property
    def title(self) -> str:
        """The name, with the variant of the format if it has several."""
        return self.name

    @property
    def options(self) -> frozenset[str]:
        """Which of convert's options it supports: recipe, threshold, columns (of outliers), scale and rounding."""
        return frozenset()

    def lay_out(self, plan: Plan, max_shard_size: str) -> Layout:
        """Decide the output tensors and the position of every byte of them, from headers alone.

        Args:
            plan: The plan of the conversion.
            max_shard_size: Size up to which a weight file is filled, such as 5GB. GGUF ignores it.
        """
        outputs = {info.name: self.outputs(plan, info) for info in plan.checkpoint.tensors.values()}
        return Layout(outputs, plan_shards(outputs.values(), max_shard_size))

    def outputs(self, plan: Plan, info: TensorInfo) -> list[OutTensor]:
        """The output tensors made from a source tensor: by default itself, if dequantized in the model's dtype."""
        dtype = plan.decoded_dtype if info.name in plan.checkpoint.decoded else info.float_dtype or info.dtype
        return [OutTensor(info.name, dtype, plan.shape_of(info))]

    def holds_experts(self, structure: Structure) -> bool:
        """Whether an artifact has a matrix for each expert, though the model has them fused."""
        return False

    def quantizes(self, plan: Plan) -> list[str]:
        """Names of the source tensors that become int8."""
        return [f"{name}.weight" for name in plan.modules]

    def encode(self, plan: Plan, name: str, quantizer: WeightQuantizer) -> Pieces:
        """Produce the bytes of all output tensors made from a source tensor.

        Args:
            plan: The plan of the conversion.
            name: Name of the source tensor.
            quantizer: Quantizes weights; it is used by one thread at a time.

        Yields:
            The pieces of the output tensors; those of one tensor are in order.

        Returns:
            The quantization statistics of each output tensor that holds int8 weights.

        Raises:
            WeightError: A value is NaN, or too large for the output's dtype.
        """
        info = plan.checkpoint.tensors[name]
        (out,) = plan.outputs[name]
        for first_row, block in plan.blocks(info):
            if info.dtype in FLOATING:
                check_finite(block, info, first_row)
            values = block if out.dtype == info.dtype else _rounded(block, out, info, first_row)
            yield Piece(out.name, values, block.nbytes)
        return {}

    def choose_scales(self, plan: Plan, name: str, values: Array, importance: Array) -> tuple[Array, Array]:
        """Choose the scales of a whole weight, for codes that are chosen by the output's error.

        Args:
            plan: The plan of the conversion.
            name: Name of the source tensor.
            values: The weight as `Plan.blocks` reads it, float32 [N, K].
            importance: Mean square of each input of the layer, float32 [K].

        Returns:
            The weight as it is rounded to codes, float32 [N, K], and the scales as loaders read them, float32 [N, G].
        """
        raise NotImplementedError(self.name)

    @abstractmethod
    def edit_config(self, config: dict[str, Any], plan: Plan) -> dict[str, Any]:
        """Make the artifact's config.json.

        Args:
            config: The source's config.json without its quantization_config.
            plan: The plan of the conversion.

        Returns:
            The content of the artifact's config.json.
        """

    def incomparable(self, config: dict[str, Any]) -> str:
        """Why the artifact of a model with this config.json cannot be compared with its source; empty if it can."""
        return ""

    def closed_to(self, modules: Mapping[str, str], structure: Structure, tensors: Collection[str]) -> dict[str, str]:
        """Which of `loaders` cannot open an artifact.

        Args:
            modules: Modules that are int8 -> their kind.
            structure: The modules of the model.
            tensors: Names of the tensors of the source.

        Returns:
            Loader -> the reason.
        """
        return {}

    def accepts(self, config: dict[str, Any], recipe: dict[str, Any]) -> bool:
        """Whether a config.json could have been written by `edit_config` for a recipe, as stored in the manifest."""
        return config.get("quantization_config") is None


class Int8Format(Format):
    """A format that stores int8 codes with one scale per row or group."""

    group_size: int | None = None  # weights of a row that share a scale; None for all of them
    rotate: int | None = None  # largest block of input features that is rotated; None for no rotation

    @property
    def options(self) -> frozenset[str]:
        """See `Format.options`."""
        return frozenset({"recipe", "columns", "scale", "rounding"})

    @abstractmethod
    def linears(self, structure: Structure) -> tuple[dict[str, str], dict[str, str]]:
        """Split the linear modules of a model by whether this format can store them in int8.

        Args:
            structure: The modules of the model.

        Returns:
            Modules that can be int8 -> their kind, and modules that cannot -> the reason, which users see.
        """

    @abstractmethod
    def misfits(self, modules: Mapping[str, str], structure: Structure) -> Mapping[str, str]:
        """Find int8 modules that must stay in floating point after all, because other modules do.

        Args:
            modules: Modules chosen to become int8 -> their kind.
            structure: The modules of the model.

        Returns:
            Those that must stay in floating point -> the reason, which users see.
        """

    @abstractmethod
    def module_tensors(self, module: str, shape: tuple[int, int], kind: str) -> list[OutTensor]:
        """The output tensors of an int8 module with a weight of shape [N, K]; the codes come first."""

    def rotation(self, module: str, columns: int, kind: str) -> int:
        """The blocks of input features by which an int8 weight is stored rotated, as its loaders rotate the inputs.

        Args:
            module: Name of the module.
            columns: K of its weight.
            kind: Its kind, as in `linears`.

        Returns:
            The size of a block, one of ROTATIONS; 0 for no rotation.
        """
        return 0

    def pack(self, codes: Array, kind: str) -> Array:
        """Convert codes int8 [n, K] to the form in which the first of `module_tensors` stores them."""
        return codes

    @abstractmethod
    def scales(self, absmax: Array, shape: tuple[int, int], kind: str) -> list[Array]:
        """The values of the other `module_tensors`, in their order.

        Args:
            absmax: Largest magnitude of each row, float32 [N].
            shape: Shape [N, K] of the weight.
            kind: Kind of the module, as in `linears`.
        """

    def outputs(self, plan: Plan, info: TensorInfo) -> list[OutTensor]:
        """See `Format.outputs`; the weight of an int8 module becomes the tensors of that module."""
        module = info.name.removesuffix(".weight")
        if module == info.name or module not in plan.modules:
            return super().outputs(plan, info)
        rows, columns = plan.shape_of(info)
        return self.module_tensors(module, (rows, columns), plan.modules[module])

    def encode(self, plan: Plan, name: str, quantizer: WeightQuantizer) -> Pieces:
        """See `Format.encode`; quantizes the weight [N, K] of an int8 module, or copies its codes if it is int8."""
        module = name.removesuffix(".weight")
        if module == name or module not in plan.modules:
            return (yield from super().encode(plan, name, quantizer))
        info, kind, calibrated = plan.checkpoint.tensors[name], plan.modules[module], plan.calibrated.get(module)
        weight, *others = plan.outputs[name]
        rows, columns = plan.shape_of(info)
        stats, source = ColumnStats.empty(columns), blake3()
        absmax: list[Array] = []
        exact: list[Array] = []
        search, is_rotated, chosen = plan.searches.get(name), name in plan.rotations, plan.rounded
        carried, from_float4 = info.is_int8 and not is_rotated, info.stored_dtype in FLOAT4 and not is_rotated
        if search or from_float4:
            quantizer = CpuQuantizer(search, exact=from_float4)
        if chosen is not None and name in chosen:
            encoded = _chosen(plan, chosen, info, stats)
        elif carried:
            encoded = _carried(plan, info, stats)
        else:
            blocks = (block for _, block in plan.blocks(info, quantizer.block_bytes, STATS_TILE_ROWS))
            encoded = quantizer.quantize(blocks, stats)
        for values, codes, peaks in encoded:
            source.update(as_bytes(codes if carried else values))
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
        found = summarize(
            stats, scales, info.stored_dtype, source.hexdigest(), name in plan.transposed,
            MSE if search else ABSMAX, NEAREST if chosen is None else chosen.rounding_of(name),
        )  # fmt: skip
        return {weight.name: found}

    def choose_scales(self, plan: Plan, name: str, values: Array, importance: Array) -> tuple[Array, Array]:
        """See `Format.choose_scales`."""
        search = ScaleSearch(importance) if name in plan.searches else None
        _, absmax = cpu.quantize_rowwise(
            values, None, search, plan.checkpoint.tensors[name].stored_dtype in FLOAT4 and name not in plan.rotations
        )
        return to_float16(values).astype(np.float32), scale_of(absmax)[:, None]


def make_format(
    name: str,
    scheme: str | None = None,
    moe: str | None = None,
    group_size: int | None = None,
    rotate: int | None = None,
) -> Format:
    """Make the output format for the given options.

    Args:
        name: Name of the format (`--format`).
        scheme: Scheme of compressed-tensors (`--scheme`); None for its default.
        moe: Loader that experts of compressed-tensors are laid out for (`--moe`); None for its default.
        group_size: Weights that share a scale, in scheme w8a16 (`--group-size`); None for one scale per row.
        rotate: Largest block of input features that is rotated (`--rotate`); None for no rotation.

    Raises:
        OutputError: A value is unknown, or the format does not support one of the options.
    """
    options: dict[str, tuple[object, tuple[object, ...]]] = {
        "scheme": (scheme, SCHEMES), "moe": (moe, MOE_LOADERS), "group_size": (group_size, GROUP_SIZES),
        "rotate": (rotate, ROTATIONS),
    }  # fmt: skip
    for option, (value, known) in options.items():
        written = f"{option.replace('_', '-')} {value}"
        if value is not None and value not in known:
            raise OutputError(f"{written}: unknown; name one of {', '.join(map(str, known))}")
        if value is not None and name != COMPRESSED_TENSORS:
            raise OutputError(f"{written}: needs --format compressed-tensors; leave it out, or add that")
    if group_size is not None and scheme != GROUPED_SCHEME:
        raise OutputError(f"group-size {group_size}: needs --scheme {GROUPED_SCHEME}; leave it out, or add that")
    if name == COMPRESSED_TENSORS:
        from quantize8.formats.compressed_tensors import CompressedTensors

        given: dict[str, Any] = {option: value for option, (value, _) in options.items() if value is not None}
        suffix = (scheme or SCHEMES[0]) + (f"-g{group_size}" if group_size else "") + ("-rotated" if rotate else "")
        return CompressedTensors(suffix=suffix, **given)
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
    """Modules with a matrix that stays in floating point, under their names in the checkpoint and in the model."""
    for info in plan.checkpoint.tensors.values():
        module = info.name.removesuffix(".weight")
        if len(info.shape) == 2 and module != info.name and module not in plan.modules:
            yield module
    yield from plan.skip_list


def plan_shards(groups: Iterable[list[OutTensor]], max_shard_size: str) -> list[Shard]:
    """Distribute tensors over weight files, in order.

    Args:
        groups: Output tensors in groups (one module's, usually) that stay together in a file.
        max_shard_size: Size up to which a file is filled, such as 5GB; a larger group gets a file of its own.

    Returns:
        The layout of each file.

    Raises:
        OutputError: `max_shard_size` is not a size.
    """
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
    """Lay out a safetensors file in the order of the safetensors library: wide dtypes first, then by name."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}  # transformers requires the format
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
    """Make the index of the weight files, as transformers writes it.

    Args:
        shards: The weight files.
        always: Write an index even for a single file. Without an index, loaders read every *.safetensors file, also
            one that is not a weight file.

    Returns:
        File name -> content; empty if there is no index.
    """
    if len(shards) == 1 and not always:
        return {}
    weight_map = {tensor.name: shard.file for shard in shards for tensor in shard.tensors}
    total = sum(tensor.nbytes for shard in shards for tensor in shard.tensors)
    value = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    return {INDEX_NAME: json.dumps(value, indent=2).encode() + b"\n"}


def parse_size(text: str) -> int:
    """Parse a size such as 5GB (10^9 bytes each) or 512MiB (2^20 bytes each); raises OutputError if it is not one."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]?I?B?)", text.strip().upper())
    if match is None or match[2] not in _SIZE_UNITS or float(match[1]) * _SIZE_UNITS[match[2]] < 1:
        raise OutputError(f"max-shard-size {text!r}: not a size; write for example 5GB or 500MB")
    return int(float(match[1]) * _SIZE_UNITS[match[2]])


def check_finite(block: Array, info: TensorInfo, first_row: int) -> None:
    """Check that a tensor has no NaN, and that weights and biases have no infinity (a mask may contain -inf).

    Args:
        block: Consecutive rows of the tensor.
        info: The tensor that the rows belong to.
        first_row: Index of the first of the rows.

    Raises:
        WeightError: There is such a value; the message names the file, the tensor and the row.
    """
    is_parameter = info.name.rpartition(".")[2] in _PARAMETERS
    if not cpu.all_finite(block) and (is_parameter or np.isnan(block).any()):
        finite = np.isfinite(block).reshape(len(block) if block.ndim else 1, -1).all(axis=1)
        row = first_row + int(np.argmin(finite))
        raise WeightError(f"{info.file}: {info.name} row {row} holds NaN or infinity; repair or replace the checkpoint")


def cannot_hold(info: TensorInfo, row: int, holder: str) -> WeightError:
    """The error for a row with a value whose magnitude is too large for the output's number format, `holder`."""
    return WeightError(
        f"{info.file}: {info.name} row {row} holds a value too large for {holder}; choose another --format, "
        f"{_OVERWRITE}"
    )


def _carried(plan: Plan, info: TensorInfo, stats: ColumnStats) -> Iterator[tuple[Array, Array, Array]]:
    """Yield dequantized blocks [n, K] of an int8 source, with their unchanged codes int8 [n, K] and absmax [n].

    The statistics describe the dequantized values. Their error is zero, except in rows that contain the code -128.
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


def _chosen(
    plan: Plan, chosen: RoundedWeights, info: TensorInfo, stats: ColumnStats
) -> Iterator[tuple[Array, Array, Array]]:
    """Yield blocks [n, K] of a weight whose codes were chosen by calibration, codes int8 [n, K] and absmax [n]."""
    for first_row, block in plan.blocks(info, None, STATS_TILE_ROWS):
        codes, scales = chosen.rows(info.name, first_row, first_row + len(block))
        absmax = absmax_of(scales[:, 0])
        cpu.column_stats(block, codes, absmax, stats)
        yield block, codes, absmax


def _rounded(block: Array, out: OutTensor, info: TensorInfo, first_row: int) -> Array:
    """Round values to the output's dtype; raises WeightError if one is too large for it."""
    with np.errstate(over="ignore"):
        values = np.ascontiguousarray(block, np.float32).astype(DTYPES[out.dtype])
    if cpu.all_finite(values):
        return values
    fits = (np.isfinite(values) | ~np.isfinite(block)).reshape(len(values) if values.ndim else 1, -1).all(axis=1)
    if not fits.all():
        raise cannot_hold(info, first_row + int(np.argmin(fits)), out.dtype)
    return values


def _unfit(values: Array, absmax: Array, info: TensorInfo, first_row: int) -> WeightError:
    """The error for the first row that cannot be quantized: it has NaN or infinity, or is too large for float16."""
    row = int(np.argmin(np.isfinite(absmax)))
    where = f"{info.file}: {info.name} row {first_row + row}"
    magnitudes: Any = np.abs(values[row].astype(np.float32))
    if np.isfinite(magnitudes).all():
        return WeightError(
            f"{where} holds |w| = {magnitudes.max():g}, over float16's {FLOAT16_MAX:g}, and int8 is made from float16; "
            f"leave it in floating point by a recipe with skip = [{info.name.removesuffix('.weight')!r}], {_OVERWRITE}"
        )
    return WeightError(f"{where} holds NaN or infinity; repair or replace the checkpoint")
