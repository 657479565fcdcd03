"""A checkpoint with quantized weights, presented as floating-point tensors that are dequantized as they are read."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from quantize8 import limits
from quantize8.errors import SourceError
from quantize8.formats import (
    BITSANDBYTES,
    COMPRESSED_TENSORS,
    awq,
    bitsandbytes,
    compressed_tensors,
    fp8,
    gptq,
    modelopt,
    mxfp4,
)
from quantize8.formats.encoding import Encoding, RowwiseInt8
from quantize8.kernels.reference import Array
from quantize8.sources.base import QUANT_CONFIG_NAME, Checkpoint, TensorInfo, contained
from quantize8.sources.wrapper import Wrapper

_FORMATS: dict[str, Callable[[Checkpoint, dict[str, Any]], dict[str, Encoding]]] = {
    BITSANDBYTES: bitsandbytes.find,
    COMPRESSED_TENSORS: compressed_tensors.find,
    fp8.METHOD: fp8.find,
    awq.METHOD: awq.find,
    gptq.METHOD: gptq.find,
    mxfp4.METHOD: mxfp4.find,
    modelopt.METHOD: modelopt.find,
}


class QuantizedCheckpoint(Wrapper):
    """The weights of `stored` under their usual names, dequantized; `int8_rows` gives int8 weights unchanged.

    Args:
        stored: The checkpoint as it is stored.
        encodings: The quantized weights, by module name.

    Raises:
        SourceError: A tensor is quantized by its dtype, but has no scale.
    """

    def __init__(self, stored: Checkpoint, encodings: dict[str, Encoding]) -> None:
        super().__init__(stored, {})
        self.encodings = {encoding.name: encoding for encoding in encodings.values()}
        self.decoded = frozenset(self.encodings)
        parts = {part: name for name, encoding in self.encodings.items() for part in encoding.tensors}
        for info in stored.tensors.values():
            name = parts.get(info.name)
            if name is None and not compressed_tensors.unused(info.name):
                self._check_plain(info)
                self.tensors[info.name] = info
            elif name is not None and name not in self.tensors:
                encoding = self.encodings[name]
                rowwise, turned = isinstance(encoding, RowwiseInt8), encoding.rotation
                how = (encoding.stored_dtype, rowwise and not turned, turned if rowwise else 0)
                self.tensors[name] = TensorInfo(name, encoding.dtype, encoding.shape, info.file, *how)

    @property
    def config(self) -> dict[str, Any]:
        """The config.json of the model, without its quantization."""
        return {key: value for key, value in super().config.items() if key not in _CONFIG_KEYS}

    def int8_rows(self, name: str, start: int, stop: int) -> tuple[Array, Array]:
        """See `Checkpoint.int8_rows`."""
        encoding = self.encodings[name]
        assert isinstance(encoding, RowwiseInt8)
        return encoding.int8_rows(start, stop)

    def rows(self, name: str, start: int, stop: int) -> Array:
        """See `Checkpoint.rows`."""
        encoding = self.encodings.get(name)
        return super().rows(name, start, stop) if encoding is None else encoding.rows(start, stop)

    def blocks(self, name: str, block_bytes: int | None = None, multiple: int = 1) -> Iterator[Array]:
        """See `Checkpoint.blocks`."""
        try:
            yield from super().blocks(name, block_bytes, multiple)
        finally:
            if name in self.encodings:
                self.encodings[name].release()

    def _check_plain(self, info: TensorInfo) -> None:
        if info.dtype.startswith("F8") or (info.dtype == "I8" and info.name.endswith(".weight")):
            where = self.folder / info.file
            raise SourceError(f"{where}: {info.name} is {info.dtype} without a scale; fetch the checkpoint again")


_CONFIG_KEYS = ("quantization_config", "compression_config")
_MLX_KEY = "quantization"
_GPTQ_NAME = "quantize_config.json"
_PACKED = ".qweight"


def decode(stored: Checkpoint) -> Checkpoint:
    """Wrap a quantized checkpoint so that it is dequantized as it is read.

    Args:
        stored: The checkpoint as it is stored.

    Returns:
        The checkpoint itself if its config.json names no quantization and no tensor is float8, otherwise the wrapper.

    Raises:
        SourceError: The quantization method is not read, or the weights are not stored as config.json says.
    """
    entry = _entry(stored)
    if entry is None:
        is_cast = any(info.dtype.startswith("F8") for info in stored.tensors.values())
        return fp8.uncast(stored) if is_cast else stored
    method = entry.get("quant_method", BITSANDBYTES if "load_in_8bit" in entry else None)
    if isinstance(method, str) and method.startswith(modelopt.METHOD):  # vLLM's names add the kind: modelopt_fp4
        method = modelopt.METHOD
    if method is None and "group_size" in entry:
        method = "MLX"
    if not isinstance(method, str) or method not in _FORMATS:
        known = ", ".join(_FORMATS)
        raise SourceError(
            f"{stored.folder}: is quantized by {method}, which is not read (only {known}); use the original checkpoint"
        )
    if method == COMPRESSED_TENSORS:
        stored = compressed_tensors.with_module_names(stored)
    encodings = _FORMATS[method](stored, entry)
    if not encodings:
        raise SourceError(
            f"{stored.folder}: says it is quantized by {method}, but holds no such weight; fetch it again"
        )
    return QuantizedCheckpoint(stored, encodings)


def _entry(stored: Checkpoint) -> dict[str, Any] | None:
    """The quantization_config of config.json, or for early checkpoints of AutoGPTQ and ModelOpt that of a file."""
    config = stored.config
    entry = next((config[key] for key in (*_CONFIG_KEYS, _MLX_KEY) if config.get(key)), None)
    if entry is not None and not isinstance(entry, dict):
        raise SourceError(f"{stored.folder}: its quantization_config is not a JSON object; fetch config.json again")
    if entry is not None:
        return entry
    path = stored.folder / QUANT_CONFIG_NAME
    if path.is_file() and any(name.endswith(modelopt.SCALE) for name in stored.tensors):
        found = limits.read_object(contained(path, stored.folder), limits.CONFIG_BYTES, SourceError)
        return found | {"quant_method": modelopt.METHOD}
    packed = next((name for name in stored.tensors if name.endswith(_PACKED)), None)
    if packed is None:
        return None
    path = stored.folder / _GPTQ_NAME
    if not path.is_file():
        raise SourceError(
            f"{stored.folder}: {packed} is packed as GPTQ and AWQ do, but neither config.json nor {_GPTQ_NAME} says "
            "how; fetch it again, or use the original checkpoint"
        )
    return limits.read_object(contained(path, stored.folder), limits.CONFIG_BYTES, SourceError) | {
        "quant_method": gptq.METHOD
    }
