"""The gguf format: a single file in Q8_0 that llama.cpp runs, for the models of `architectures`.

The position of every byte follows from headers alone, so tensors can be written in any order. llama.cpp has all experts
of a layer in one tensor: each expert is written to its place there, and has a digest and statistics of its own.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np
from gguf import GGML_QUANT_VERSION, GGMLQuantizationType, GGUFValueType, GGUFWriter, Keys, LlamaFileType

from quantize8.artifact.manifest import Quantized, summarize
from quantize8.formats import GGUF
from quantize8.formats.base import (
    Format,
    Layout,
    Measured,
    OutTensor,
    Piece,
    Pieces,
    Shard,
    WeightQuantizer,
    cannot_hold,
    check_finite,
)
from quantize8.formats.gguf.architectures import MULTIMODAL, Field, GgufTensor, architecture, settings, tensors_of
from quantize8.formats.gguf.header import Header as GgufHeader
from quantize8.formats.gguf.reader import GgufCheckpoint
from quantize8.kernels import ABSMAX, GPTQ, MSE, NEAREST, q8_0
from quantize8.kernels.q8_0 import Q8_0
from quantize8.kernels.reference import STATS_TILE_ROWS, Array, ColumnStats, as_bytes, scale_of
from quantize8.kernels.scales import ScaleSearch
from quantize8.sources.base import FLOAT4, TensorInfo, architecture_of

if TYPE_CHECKING:
    from quantize8.conversion.plan import Plan
    from quantize8.sources.structure import Structure

_OWN_KEYS = {Keys.General.ARCHITECTURE, Keys.General.FILE_TYPE, Keys.General.QUANTIZATION_VERSION}
_OWN_KEYS |= {Keys.General.ALIGNMENT, Keys.Split.LLM_KV_SPLIT_NO, Keys.Split.LLM_KV_SPLIT_COUNT}
_OWN_KEYS.add(Keys.Split.LLM_KV_SPLIT_TENSORS_COUNT)


class Header(NamedTuple):
    """The header of a file, the offset of each tensor from the start of the file, and its size; gaps are zeros."""

    content: bytes
    offsets: dict[str, int]
    nbytes: int


@dataclass(frozen=True)
class Gguf(Format):
    """One file in which every matrix is Q8_0 and every vector float32, with llama.cpp's names and settings."""

    name: str = GGUF
    suffix: str = GGUF
    is_folder: ClassVar[bool] = False
    loaders: ClassVar[tuple[str, ...]] = ("llama.cpp", "quantize8")

    @property
    def options(self) -> frozenset[str]:
        """See `Format.options`."""
        return frozenset({"scale", "rounding"})

    def lay_out(self, plan: Plan, max_shard_size: str) -> Layout:
        """See `Format.lay_out`; makes a single file of any size."""
        from quantize8.formats.gguf.tokenizer import tokenizer_fields

        checkpoint = plan.checkpoint
        config, where = checkpoint.config, checkpoint.name
        tensors = tensors_of(config, {name: info.shape for name, info in checkpoint.tensors.items()}, where)
        if isinstance(origin := checkpoint.origin, GgufCheckpoint):
            fields = carried(origin.header)
        else:
            fields = [*settings(config, where, where), *tokenizer_fields(checkpoint.folder, config)]
        start = header(architecture(config, where), fields, tensors)
        outputs: dict[str, list[OutTensor]] = {}
        for tensor in tensors:
            outputs.setdefault(tensor.source or tensor.name, []).append(tensor)
        return Layout(outputs, [Shard(f"{where}-{Q8_0}.gguf", [*tensors], *start)])

    def holds_experts(self, structure: Structure) -> bool:
        """See `Format.holds_experts`; they are written one by one, each to its place."""
        return True

    def quantizes(self, plan: Plan) -> list[str]:
        """See `Format.quantizes`; every matrix is quantized."""
        return [name for name, group in plan.outputs.items() if any(tensor.dtype == Q8_0 for tensor in group)]

    def encode(self, plan: Plan, name: str, quantizer: WeightQuantizer) -> Pieces:
        """See `Format.encode`; a vector becomes float32, a matrix Q8_0, keeping the codes if it is int8 already."""
        tensors = [tensor for tensor in plan.outputs[name] if isinstance(tensor, GgufTensor)]
        if tensors[0].values is not None:
            yield Piece(tensors[0].name, tensors[0].values)
            return {}
        info, search = plan.checkpoint.tensors[name], plan.searches.get(name)
        chosen = plan.rounded if plan.rounded is not None and name in plan.rounded else None
        encodings = [_Encoding(tensor, info, search) for tensor in tensors]
        multiple = math.lcm(STATS_TILE_ROWS, *(tensor.multiple for tensor in tensors))
        for first_row, block in plan.blocks(info, None, multiple):
            check_finite(block, info, first_row)
            codes = None
            if chosen is not None:
                codes = chosen.rows(name, first_row, first_row + len(block))
            elif info.is_int8 and tensors[0].dtype == Q8_0:
                carried, absmax = plan.checkpoint.int8_rows(name, first_row, first_row + len(block))
                codes = carried, scale_of(absmax)[:, None]
            for i, each in enumerate(encodings):
                yield Piece(each.tensor.name, each.encode(block, codes, first_row), 0 if i else block.nbytes)
        rounding = NEAREST if chosen is None else GPTQ
        return {each.tensor.name: each.complete(rounding) for each in encodings if each.is_int8}

    def choose_scales(self, plan: Plan, name: str, values: Array, importance: Array) -> tuple[Array, Array]:
        """See `Format.choose_scales`."""
        search = ScaleSearch(importance) if name in plan.searches else None
        packed = q8_0.quantize_rows(
            np.ascontiguousarray(values), search, plan.checkpoint.tensors[name].stored_dtype in FLOAT4
        )
        return values, q8_0.scales_of(packed)

    def incomparable(self, config: dict[str, Any]) -> str:
        """See `Format.incomparable`."""
        class_name = architecture_of(config)
        return f"of {class_name}, only the language model is in GGUF" if class_name == MULTIMODAL else ""

    def edit_config(self, config: dict[str, Any], plan: Plan) -> dict[str, Any]:
        """Not called, because the settings are in the GGUF file."""
        raise NotImplementedError(self.name)


class _Encoding:
    """One tensor in the making, block by block, with its statistics.

    Args:
        tensor: The tensor.
        info: The tensor of the checkpoint that it is made from.
        search: What the search for its scales minimizes; None if they are not searched.
    """

    def __init__(self, tensor: GgufTensor, info: TensorInfo, search: ScaleSearch | None) -> None:
        self.tensor, self._info, self._search = tensor, info, search
        self._measured = Measured(ColumnStats.empty(info.shape[-1]))

    @property
    def is_int8(self) -> bool:
        """Whether the tensor is Q8_0."""
        return self.tensor.dtype == Q8_0

    def encode(self, block: Array, codes: tuple[Array, Array] | None, first_row: int) -> Array:
        """The data of the tensor that a block of rows of its source becomes.

        Args:
            block: The rows, as read.
            codes: Their codes int8 [n, K] and scales float32 [n, G], if the source is int8, or calibration chose them.
            first_row: Index of the first of them.
        """
        chosen = self.tensor.choose(block)
        self._measured.source.update(as_bytes(chosen))
        values = np.ascontiguousarray(self.tensor.arrange(chosen), np.float32)
        if not self.is_int8:
            return values + np.float32(self.tensor.offset) if self.tensor.offset else values
        if codes is not None:
            data = q8_0.with_scales(*(self.tensor.arrange(self.tensor.choose(part)) for part in codes))
        else:
            data = q8_0.quantize_rows(values, self._search, self._info.stored_dtype in FLOAT4)
        if (row := q8_0.first_unfit(data)) is not None:
            first, step = self.tensor.rows
            raise cannot_hold(self._info, first_row + first + row * step, "Q8_0's float16 scale")
        self._measured.add(values, q8_0.row_errors(values, data))
        return data

    def complete(self, rounding: str) -> Quantized:
        """The statistics of all rows, with Q8_0's error and how the codes were chosen."""
        stats, peaks = self._measured.complete()
        scale, digest = ABSMAX if self._search is None else MSE, self._measured.source.hexdigest()
        return summarize(stats, peaks, self._info.stored_dtype, digest, False, scale, rounding)


def carried(source: GgufHeader) -> list[Field]:
    """Copy the metadata of a GGUF file, with its tokenizer, but without the entries on how weights are stored."""
    fields = []
    for key, entry in source.entries.items():
        if key not in _OWN_KEYS:
            items = None if entry.items is None else GGUFValueType(entry.items)
            fields.append(Field(key, source.value(key), GGUFValueType(entry.kind), items))
    return fields


def header(arch: str, fields: Iterable[Field], tensors: Sequence[GgufTensor]) -> Header:
    """Make the header of a file with llama.cpp's own writer; the same arguments give the same bytes.

    Args:
        arch: llama.cpp's name of the architecture.
        fields: The metadata.
        tensors: The tensors in storage order, the experts of a tensor one after the other.
    """
    whole = [[*group] for _, group in groupby(tensors, key=lambda tensor: tensor.stack or tensor.name)]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "header"
        writer = GGUFWriter(path, arch)
        for entry in fields:
            if not (entry.kind == GGUFValueType.ARRAY and not entry.value):  # the type of an empty array is unknown
                writer.add_key_value(entry.key, entry.value, entry.kind, entry.items)
        writer.add_file_type(LlamaFileType.MOSTLY_Q8_0)
        writer.add_quantization_version(GGML_QUANT_VERSION)
        for group in whole:
            first, nbytes = group[0], sum(tensor.nbytes for tensor in group)
            shape = (len(group), *first.shape) if first.stack else first.shape
            kind = GGMLQuantizationType[first.dtype]
            writer.add_tensor_info(first.stack or first.name, shape, np.dtype(np.float32), nbytes, kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        writer.close()
        content = path.read_bytes()
    content += bytes(-len(content) % writer.data_alignment)
    offsets, position = {}, len(content)
    for group in whole:
        for tensor in group:
            offsets[tensor.name] = position
            position += tensor.nbytes
        position += -position % writer.data_alignment
    return Header(content, offsets, position)
