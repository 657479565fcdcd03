"""Limits on what a file may contain or claim, each with its reason, so that a bad file is refused with one clear error.

The limits are far above what published models need, so only a damaged or hostile file reaches one.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from quantize8.errors import Quantize8Error

CONFIG_BYTES = 16 * 2**20  # config.json and other settings; the largest contain label tables, about 1 MiB
HEADER_BYTES = 100_000_000  # header of a safetensors file: the library's own limit
INDEX_BYTES = HEADER_BYTES  # the index lists the tensors of all headers; DeepSeek-V3's is 9 MB
SMALL_BYTES = 2**30  # any small file that is copied or downloaded; a tokenizer is about 30 MB
MANIFEST_BYTES = 2**28  # about 700 bytes per tensor: 65 MB for DeepSeek-V3
RECIPE_BYTES = 2**20
TOKENIZER_BYTES = 2**28  # tokenizer.json; 33 MB with Gemma's 262,144 tokens
PICKLE_BYTES = 2**28  # the pickle that describes the tensors of a .bin file; about 200 bytes per tensor
FILES = 10_000  # files in a model folder and its subfolders; DeepSeek-V3 has about 200
JSON_DEPTH = 64  # nesting of JSON; settings have 5 levels, and Python's recursion fails at a few hundred
TENSORS = 2**20  # tensors of a checkpoint; DeepSeek-V3 has 92,000
NAME_LENGTH = 1024  # characters of a tensor's name; usual names have up to 100
DIMENSIONS = 16  # dimensions of a tensor; NumPy allows 64
TENSOR_BYTES = 2**48  # size of one tensor: NumPy and torch count in int64, and products of sizes must not overflow
EMPTY_LENGTH = 2**24  # product of the nonzero dimensions of an empty tensor, for which the file stores no bytes
GGUF_HEADER_BYTES = 2**28  # all that precedes the tensors of a GGUF file: tokens and merges; 6 MB for Qwen2's 151,936
METADATA_VALUES = 2**22  # metadata values of a GGUF file, mostly tokens and merges; 1,000,000 with GPT-4o's merges
TOKEN_SQUARES = 2**30  # sum of squared token lengths in a GGUF file: finding merges tries each split; Qwen2: 9 million
VOCABULARY = 2**22  # token ids of a tokenizer; Gemma 3 has 262,208
LAYERS = 4096  # layers according to config.json; Llama 3.1 405B has 126
MODULES = 200_000  # modules of a model as transformers builds it; 50,000 where each expert is a module


def is_file(path: Path) -> bool:
    """Whether `path` is a regular file; False for a name that no file can have."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def read_bytes(path: Path, limit: int, error: type[Quantize8Error]) -> bytes:
    """Read a small file completely.

    Args:
        path: The file.
        limit: Largest size that is accepted, in bytes.
        error: Exception class to raise.

    Raises:
        Quantize8Error: As `error`: the file is missing, not a regular file, not readable, or larger than `limit`.
    """
    if not is_file(path):  # a pipe or a device would never end
        raise error(f"{path}: missing, or not a regular file; fetch it again")
    try:
        with path.open("rb") as file:
            data = file.read(limit + 1)
    except OSError as failure:
        raise error(f"{path}: cannot be read ({failure.strerror}); check the file and its permissions") from None
    if len(data) > limit:
        raise error(f"{path}: is larger than the {limit:,} bytes that such a file may have; fetch it again")
    return data


def read_object(path: Path, limit: int, error: type[Quantize8Error]) -> dict[str, Any]:
    """Read a JSON object from a file.

    Args:
        path: The file.
        limit: Largest size that is accepted, in bytes.
        error: Exception class to raise.

    Raises:
        Quantize8Error: As `error`: see `read_bytes`; or the file is not a JSON object, or is nested deeper than
            JSON_DEPTH.
    """
    return parse_object(read_bytes(path, limit, error), path, error)


def parse_object(data: bytes, path: Path, error: type[Quantize8Error]) -> dict[str, Any]:
    """Parse a JSON object with the checks of `read_object`.

    Args:
        data: The JSON text.
        path: File that the error message names.
        error: Exception class to raise.

    Raises:
        Quantize8Error: As `error`: `data` is not a JSON object, or is nested deeper than JSON_DEPTH.
    """
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as failure:
        raise error(f"{path}: not readable as JSON ({failure}); fetch it again") from None
    if not isinstance(value, dict):
        raise error(f"{path}: contains no JSON object; fetch it again")
    level: list[Any] = [value]
    for _ in range(JSON_DEPTH):
        level = [
            inner
            for outer in level
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, dict | list)
        ]
        if not level:
            return value
    raise error(f"{path}: is nested deeper than {JSON_DEPTH} levels; fetch it again")


def check_tensor(name: str, shape: Sequence[int], itemsize: int, where: str, error: type[Quantize8Error]) -> None:
    """Check the name and the shape that a header gives for a tensor.

    Args:
        name: Name of the tensor.
        shape: Its shape.
        itemsize: Bytes per element.
        where: What the error message calls the file.
        error: Exception class to raise.

    Raises:
        Quantize8Error: As `error`: the name is empty, too long or not printable, or the shape is invalid or too large.
    """
    if not name or len(name) > NAME_LENGTH or not name.isprintable():
        raise error(f"{where}: has a tensor with the invalid name {name[:100]!r}; fetch the file again")
    if len(shape) > DIMENSIONS or any(type(size) is not int or size < 0 for size in shape):
        raise error(f"{where}: {name} has an invalid shape; fetch the file again")
    limit = EMPTY_LENGTH if 0 in shape else TENSOR_BYTES // itemsize
    if math.prod(size or 1 for size in shape) > limit:
        raise error(f"{where}: {name} has the shape {list(shape)}, which is too large; fetch the file again")
