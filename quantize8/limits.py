"""How much a file may hold or claim before it is refused in one line: each limit with its reason, in one home.

The limits lie well above what published models have, so that only a damaged or hostile file meets one.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from quantize8.errors import Quantize8Error

CONFIG_BYTES = 16 * 2**20  # config.json and other settings; the largest have tables of labels, about 1 MiB
HEADER_BYTES = 100_000_000  # of a safetensors file: the library's own limit
INDEX_BYTES = HEADER_BYTES  # which tells the same of all files; DeepSeek-V3's has 9 MB
SMALL_BYTES = 2**30  # of any small file that comes from elsewhere; a tokenizer has some 30 million
MANIFEST_BYTES = 2**28  # some 700 bytes a tensor: 65 MB for DeepSeek-V3
RECIPE_BYTES = 2**20
TOKENIZER_BYTES = 2**28  # tokenizer.json; 33 MB with Gemma's 262,144 tokens
PICKLE_BYTES = 2**28  # what tells the tensors of a .bin file apart; some 200 bytes each
FILES = 10_000  # of a model folder and the folders in it; DeepSeek-V3 has some 200
JSON_DEPTH = 64  # nested settings have 5 levels; recursion fails at some hundreds
TENSORS = 2**20  # DeepSeek-V3 has 92,000
NAME_LENGTH = 1024  # of a tensor; they have 100
DIMENSIONS = 16  # of a tensor; NumPy has 64
TENSOR_BYTES = 2**48  # of one tensor: NumPy and torch count in int64, and products of that must not wrap
EMPTY_LENGTH = 2**24  # of a dimension of a tensor without values, which no byte in the file backs
GGUF_HEADER_BYTES = 2**28  # of a GGUF file, before its tensors: tokens and merges; 6 MB with Qwen2's 151,936
METADATA_VALUES = 2**22  # of a GGUF file, tokens and merges again; 1,000,000 with GPT-4o's merges
TOKEN_SQUARES = 2**30  # of the lengths of a GGUF's tokens, each cut at every place to find merges; 9 million of Qwen2
VOCABULARY = 2**22  # ids of a tokenizer; Gemma 3 has 262,208
LAYERS = 4096  # as config.json counts them; Llama 3.1 405B has 126
MODULES = 200_000  # of a model as transformers builds it; 50,000 where each expert is a module


def is_file(path: Path) -> bool:
    """Whether a regular file is there; a name that no file can have names none."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def read_bytes(path: Path, limit: int, error: type[Quantize8Error]) -> bytes:
    """A small file whole; `error` where it is missing, no regular file, not readable, or has more bytes than that."""
    if not is_file(path):  # a pipe or a device would never end
        raise error(f"{path}: missing, or no file; fetch it again")
    try:
        with path.open("rb") as file:
            data = file.read(limit + 1)
    except OSError as failure:
        raise error(f"{path}: cannot be read ({failure.strerror}); look at the file") from None
    if len(data) > limit:
        raise error(f"{path}: is larger than the {limit:,} bytes such a file may have; fetch it again")
    return data


def read_object(path: Path, limit: int, error: type[Quantize8Error]) -> dict[str, Any]:
    """A JSON object from a file; `error` where it is none, or nested deeper than JSON_DEPTH."""
    return parse_object(read_bytes(path, limit, error), path, error)


def parse_object(data: bytes, path: Path, error: type[Quantize8Error]) -> dict[str, Any]:
    """See `read_object`; `path` is for the message."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as failure:
        raise error(f"{path}: not readable as JSON ({failure}); fetch the file again") from None
    if not isinstance(value, dict):
        raise error(f"{path}: holds no JSON object; fetch the file again")
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
    raise error(f"{path}: is nested deeper than {JSON_DEPTH} levels; fetch the file again")


def check_tensor(name: str, shape: Sequence[int], itemsize: int, where: str, error: type[Quantize8Error]) -> None:
    """Raise `error` for a tensor with a name that cannot be shown, or a shape that no file holds."""
    if not name or len(name) > NAME_LENGTH or not name.isprintable():
        raise error(f"{where}: has a tensor called {name[:100]!r}, which is no name; fetch the file again")
    if len(shape) > DIMENSIONS or any(type(size) is not int or size < 0 for size in shape):
        raise error(f"{where}: {name} has a shape that cannot be; fetch the file again")
    limit = EMPTY_LENGTH if 0 in shape else TENSOR_BYTES // itemsize
    if math.prod(size or 1 for size in shape) > limit:
        raise error(f"{where}: {name} has the shape {list(shape)}, which no file holds; fetch it again")
