"""Reads GGUF files, whole or split, with transformers' names for the tensors.

llama.cpp stores Llama's query and key rows interleaved for its rotary embedding; `rows` undoes that. Blocks are
dequantized as they are read, to float16 (or to bfloat16 if the file holds bfloat16 tensors).
"""

from __future__ import annotations

import os
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from quantize8.errors import SourceError
from quantize8.files import fill_from, open_file
from quantize8.formats.gguf import inverse
from quantize8.formats.gguf.header import StoredTensor
from quantize8.formats.gguf.parts import model_name, read_parts
from quantize8.formats.gguf.settings import ARCHITECTURES, Origin, llama3_scaling, named_tensors, read_config
from quantize8.formats.gguf.vocabulary import TOKENS, read_tokenizer, require_tokenizer
from quantize8.kernels import ggml
from quantize8.kernels.reference import Array, as_bytes
from quantize8.sources.base import DTYPES, Checkpoint, TensorInfo, check_settings

_PERMUTED = {"llama": {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}}  # with interleaved rows
_ROPE_FACTORS = "rope_freqs.weight"
_ROPE_BYTES = 2**16  # the most that is read of these factors; a head of size 128 has 256 bytes
_FLOATS = ("F32", "F16", "BF16")


class GgufCheckpoint(Checkpoint):
    """A model in GGUF. Its config and tokenizer come from the metadata of the file.

    Args:
        path: The file, or any part of a split one.
        identity: What the manifest says of the source.
        name: The name of the model.

    Raises:
        SourceError: A file is damaged or missing, or it holds a model that is not read.
    """

    def __init__(self, path: Path, identity: dict[str, str], name: str) -> None:
        self.headers = read_parts(path, (*ARCHITECTURES, *inverse.ARCHITECTURES))
        self.header = self.headers[0]  # which has the metadata
        super().__init__(path.parent, model_name(name) if len(self.headers) > 1 else name, identity)
        self.path = self.header.path
        stored = {key: tensor for header in self.headers for key, tensor in header.tensors.items()}
        if not stored:
            what = ", only a tokenizer" if TOKENS in self.header.entries else ""
            raise SourceError(f"{self.path}: holds no weights{what}; name the model's file")
        self.dtype = "BF16" if any(tensor.kind == "BF16" for tensor in stored.values()) else "F16"
        self._config, self._origins = self._find(stored)
        for name, origin in self._origins.items():
            count, first = sum(part.shape[0] for part in origin.parts), origin.parts[0]
            self.tensors[name] = TensorInfo(name, self.dtype, (count, *first.shape[1:]), first.file)
            for part in origin.parts:
                self._check(name, part)
        self.files = {header.path.name: header.data_offset for header in self.headers}
        self._descriptors = {header.path.name: open_file(header.path, os.O_RDONLY) for header in self.headers}

    def __del__(self) -> None:
        for descriptor in getattr(self, "_descriptors", {}).values():
            os.close(descriptor)

    def rows(self, name: str, start: int, stop: int) -> Array:
        """See `Checkpoint.rows`."""
        origin = self._origins[name]
        step = len(origin.parts)
        if step == 1:
            return self._decoded(name, origin.parts[0], origin.offset, start, stop)
        first, last = start // step, -(-stop // step)
        parts = [self._decoded(name, part, origin.offset, first, last) for part in origin.parts]
        rows = np.stack(parts, axis=1).reshape(-1, *parts[0].shape[1:])
        return np.ascontiguousarray(rows[start - first * step : stop - first * step])

    def _decoded(self, name: str, tensor: StoredTensor, offset: float, start: int, stop: int) -> Array:
        """Rows of a stored tensor in the order and with the values that transformers' tensor has."""
        order = self._row_order(name, start, stop)
        if order is None or not len(order):
            stored = self._read(name, tensor, start, stop)
        else:
            first = int(order.min())
            stored = self._read(name, tensor, first, int(order.max()) + 1)[order - first]
        dtype = DTYPES[self.dtype]
        if not offset:
            return ggml.decode(stored, tensor.kind, tensor.shape[1:], dtype)
        values: Array = ggml.decode(stored, tensor.kind, tensor.shape[1:], np.dtype(np.float32)) - np.float32(offset)
        return values.astype(dtype)

    def _read(self, name: str, tensor: StoredTensor, start: int, stop: int) -> Array:
        """Read rows of a tensor as they are stored, uint8 [n, bytes of a row]."""
        row_bytes = tensor.nbytes // tensor.shape[0] if tensor.shape[0] else 0
        stored = np.empty((stop - start, row_bytes), np.uint8)
        where = f"{self.folder / tensor.file}: {name}"
        try:
            whole = fill_from(self._descriptors[tensor.file], as_bytes(stored), tensor.offset + start * row_bytes)
        except OSError as error:
            raise SourceError(f"{where} cannot be read ({error.strerror})") from None
        if not whole:
            raise SourceError(f"{where} ends early; the file changed while it was read")
        return stored

    @property
    def config(self) -> dict[str, Any]:
        """config.json, from the file's metadata."""
        return dict(self._config)

    @property
    def is_encoder(self) -> bool:
        """See `Checkpoint.is_encoder`: the metadata describes the model, not a file beside it."""
        return False

    def left_behind(self) -> dict[str, str]:
        """See `Checkpoint.left_behind`. A GGUF file needs no other file, except the projector of a vision model."""
        names = sorted(path.name for path in self.folder.glob("*mmproj*.gguf"))
        return dict.fromkeys(names, "a vision projector, which is not read")

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer that transformers derives from the file's metadata, None if the file has none."""
        return read_tokenizer(self.header)

    def require_companions(self) -> None:
        """See `Checkpoint.require_companions`; transformers builds the tokenizer."""
        require_tokenizer(self.header)

    def write_companions(self, folder: Path) -> None:
        """Write the tokenizer's files."""
        if self.tokenizer is not None:
            self.tokenizer.save_pretrained(folder)

    def _find(self, stored: dict[str, StoredTensor]) -> tuple[dict[str, Any], dict[str, Origin]]:
        """The config.json, and where each tensor of the model is."""
        shapes = {key: tensor.shape for key, tensor in stored.items()}
        by_table = inverse.class_of(self.header) is not None
        if by_table:
            scalings = [name for name in inverse.factors_of(self.header) if name in stored]
            factors = {name: self._floats(stored.pop(name)) for name in scalings}
            config = inverse.read_config(self.header, shapes, factors)
        else:
            config = read_config(self.header, shapes)
            if (tensor := stored.pop(_ROPE_FACTORS, None)) is not None:
                config |= self._scaling(config, tensor)
        check_settings(config, self.path)
        config |= {"dtype": {"F16": "float16", "BF16": "bfloat16"}[self.dtype]}
        if by_table:
            return config, inverse.origins(config, stored, self.path)
        names = self._match(config, stored)
        return config, {names[key]: Origin((tensor,)) for key, tensor in stored.items()}

    def _match(self, config: dict[str, Any], stored: dict[str, StoredTensor]) -> dict[str, str]:
        """Map llama.cpp's names to transformers'.

        Raises SourceError for a tensor that is missing, unknown, or has another shape than the metadata implies.
        """
        arch, names = self.header.architecture, {}
        for name, ours, shape in named_tensors(config):
            if name not in stored:
                raise SourceError(
                    f"{self.path}: lacks {name}, which a {arch} with {config['num_hidden_layers']} layers has; "
                    "fetch it again"
                )
            if stored[name].shape != shape:
                where = self.folder / stored[name].file
                raise SourceError(
                    f"{where}: {name} is {list(stored[name].shape)}, but by the metadata {list(shape)}; fetch it again"
                )
            names[name] = ours
        for name, tensor in stored.items():
            where = self.folder / tensor.file
            if name not in names:
                raise SourceError(f"{where}: tensor {name} is unknown for {arch}; use a safetensors checkpoint")
        return names

    def _scaling(self, config: dict[str, Any], stored: StoredTensor) -> dict[str, Any]:
        """The entry of config.json that describes the stored rotary factors."""
        where, factors = self.folder / stored.file, self._floats(stored)
        scaling = None if factors is None else llama3_scaling(config, factors)
        if scaling is None:
            raise SourceError(
                f"{where}: {_ROPE_FACTORS} does not match any llama3 rotary scaling; use a safetensors checkpoint"
            )
        return scaling

    def _floats(self, stored: StoredTensor) -> Array | None:
        """The values of a small tensor; None if it is not a small one in float32."""
        if stored.kind != "F32" or stored.nbytes > _ROPE_BYTES:
            return None
        with (self.folder / stored.file).open("rb") as file:
            file.seek(stored.offset)
            return np.frombuffer(file.read(stored.nbytes), np.float32)

    def _check(self, name: str, tensor: StoredTensor) -> None:
        """Raise SourceError if the rows of a tensor cannot be read in the way it is stored."""
        where, heads = self.folder / tensor.file, self._heads_of(name)
        if heads is not None and tensor.shape[0] % (2 * heads):
            raise SourceError(
                f"{where}: {name} has {tensor.shape[0]} rows, which are not pairs for {heads} heads; fetch it again"
            )
        if tensor.kind not in _FLOATS and (not ggml.is_read(tensor.kind) or len(tensor.shape) < 2):
            raise SourceError(
                f"{where}: {name} {list(tensor.shape)} is stored as {tensor.kind}, which is not read; "
                "use a safetensors checkpoint"
            )

    def _row_order(self, name: str, start: int, stop: int) -> Array | None:
        """Positions in the file of rows start..stop of an interleaved weight, int [n]; None if rows are in order."""
        heads = self._heads_of(name)
        if heads is None:
            return None
        half = self.tensors[name].shape[0] // heads // 2
        head, row = np.divmod(np.arange(start, stop), 2 * half)
        order: Array = head * 2 * half + row % half * 2 + row // half
        return order

    def _heads_of(self, name: str) -> int | None:
        """The number of heads of an interleaved query or key weight; None for any other weight."""
        key = _PERMUTED.get(self.header.architecture, {}).get(name.split(".")[-2])
        return None if key is None else int(self._config[key])
