"""Which GGUF files form a checkpoint: a single file, or all parts of a split one; and which file of a folder is meant.

llama.cpp splits a file into parts called NAME-00001-of-00003.gguf. The first part holds the metadata and the total
number of tensors; each part states its own number and the number of parts.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from pathlib import Path

from quantize8.errors import SourceError
from quantize8.formats.gguf.header import ARCHITECTURE, MAGIC, Header, read_header
from quantize8.sources.base import CONFIG_NAME, contained

_SUFFIX = ".gguf"
_NUMBER, _COUNT, _TENSORS = "split.no", "split.count", "split.tensors.count"
_PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})(\.gguf)", re.IGNORECASE)
_OTHER_WEIGHTS = ("*.safetensors", "pytorch_model*.bin")
_SHOWN = 3  # names that a message lists


def is_gguf(path: Path) -> bool:
    """Whether a file is GGUF, by its suffix or its first bytes: ollama's blobs have no suffix."""
    try:
        with path.open("rb") as file:
            return path.suffix.lower() == _SUFFIX or file.read(len(MAGIC)) == MAGIC
    except OSError:
        return False


def find_gguf(folder: Path) -> Path | None:
    """Find the GGUF file that is the only checkpoint of a folder.

    Weights in other formats do not count if there is no config.json, which would say what model they are.

    Args:
        folder: The folder to search.

    Returns:
        The file, or the first part of a split one. None if the folder has no GGUF file, or has other weights too.

    Raises:
        SourceError: The folder holds several models in GGUF, or a vision projector beside one.
    """
    models = group_parts(path.name for path in folder.iterdir() if path.is_file())
    others = (folder / CONFIG_NAME).is_file() and any(True for kind in _OTHER_WEIGHTS for _ in folder.glob(kind))
    if not models or others:
        return None
    projectors = [name for name in models if "mmproj" in name.lower()]
    names = [files[0] for name, files in models.items() if name not in projectors]
    if len(names) == 1 and projectors:
        raise SourceError(
            f"{folder}: holds {names[0]} and a vision projector ({projectors[0]}), which is not read; "
            f"name {names[0]} to take the language model alone"
        )
    if len(models) > 1:
        shown = ", ".join([*list(models)[:_SHOWN], *(["..."] if len(models) > _SHOWN else [])])
        raise SourceError(f"{folder}: holds {len(models)} models in GGUF ({shown}); name one of them")
    ((first, *_),) = models.values()
    return contained(folder / first, folder)


def group_parts(names: Iterable[str]) -> dict[str, list[str]]:
    """Group the GGUF files among these names by model.

    Args:
        names: File names; those without the suffix .gguf are ignored.

    Returns:
        The sorted names of each model's files. The key is the file name, or for a split model NAME-*-of-00003.gguf.
    """
    models: dict[str, list[str]] = {}
    for name in sorted(name for name in names if name.lower().endswith(_SUFFIX)):
        match = _PART.fullmatch(name)
        models.setdefault(f"{match[1]}-*-of-{match[3]}{_SUFFIX}" if match else name, []).append(name)
    return models


def model_name(name: str) -> str:
    """The name of a split model, from the name of a part without its suffix."""
    match = _PART.fullmatch(name + _SUFFIX)
    return match[1] if match else name


def read_parts(path: Path, architectures: Collection[str]) -> list[Header]:
    """Read the headers of all files of a checkpoint.

    Args:
        path: The file, or any part of a split one.
        architectures: The names of the architectures that are read.

    Returns:
        The headers in the order of the parts.

    Raises:
        SourceError: As for `read_header`; also if a part is missing or does not belong to the others.
    """
    header = read_header(path, architectures)
    count = header.value(_COUNT, 1)
    if not isinstance(count, int) or count <= 1:
        return [_with_metadata(header)]
    headers = [header if part == path else read_header(part, architectures) for part in _files(header, count)]
    first = headers[0]
    for number, part in enumerate(headers):
        _check_part(part, number, first)
    names: dict[str, Header] = {}
    for part in headers:
        if duplicate := next((name for name in part.tensors if name in names), None):
            raise SourceError(f"{part.path}: {duplicate} is also in {names[duplicate].path.name}; fetch both again")
        names |= dict.fromkeys(part.tensors, part)
    claimed = first.value(_TENSORS)
    if claimed is not None and claimed != len(names):
        raise SourceError(
            f"{first.path}: says that its parts hold {claimed!r} tensors, but they hold {len(names)}; fetch them again"
        )
    return [_with_metadata(first), *headers[1:]]


def _with_metadata(header: Header) -> Header:
    kind = header.value("general.type", "model")
    if kind != "model":
        raise SourceError(f"{header.path}: is of type {kind!r}, not a model; name the model's file")
    if ARCHITECTURE not in header.entries:
        raise SourceError(f"{header.path}: does not say its architecture ({ARCHITECTURE}); fetch it again")
    return header


def _files(header: Header, count: int) -> list[Path]:
    """The paths of all parts of a split file, from the name and metadata of one part."""
    path, number = header.path, header.value(_NUMBER)
    if type(number) is not int or not 0 <= number < count:
        raise SourceError(f"{path}: says {_NUMBER} = {number!r} of {count} parts; fetch it again")
    match = _PART.fullmatch(path.name)
    if match is None or (int(match[2]), int(match[3])) != (number + 1, count):
        raise SourceError(
            f"{path}: is part {number + 1} of {count} by its metadata, but not by its name; "
            f"rename it to ...-{number + 1:05d}-of-{count:05d}{_SUFFIX}, and the other parts likewise"
        )
    files = [path.with_name(f"{match[1]}-{part:05d}-of-{match[3]}{match[4]}") for part in range(1, count + 1)]
    for file in files:
        if not file.is_file():
            raise SourceError(f"{file}: missing; {path.name} is one of {count} parts, fetch the others too")
    return [file if file == path else contained(file, path.parent) for file in files]


def _check_part(part: Header, number: int, first: Header) -> None:
    """Raise SourceError if the metadata of a part contradicts that of the first one."""
    for key, expected in ((_NUMBER, number), (_COUNT, first.value(_COUNT)), (_TENSORS, first.value(_TENSORS))):
        if part.value(key) != expected:
            raise SourceError(
                f"{part.path}: says {key} = {part.value(key)!r}, but as a part of {first.path.name} "
                f"it must be {expected!r}; fetch both again"
            )
    if number and part.architecture != first.architecture and ARCHITECTURE in part.entries:
        raise SourceError(f"{part.path}: is a {part.architecture}, but {first.path.name} is not; fetch both again")
