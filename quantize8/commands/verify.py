"""Verify an artifact: every byte against its manifest, and values and config.json against the rules of its format."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from blake3 import blake3

from quantize8.artifact.card import CARD_NAME
from quantize8.artifact.manifest import MANIFEST_NAME, Manifest, TensorRecord, check_inside, digest, read_manifest
from quantize8.artifact.outliers import OUTLIERS_NAME, open_outliers, read_outliers
from quantize8.destinations.base import path_of
from quantize8.errors import ArtifactError, OutputError, SourceError
from quantize8.formats.base import Format, make_format
from quantize8.formats.encoding import Encoding, GroupwiseInt8, RowwiseInt8
from quantize8.formats.gguf.header import StoredTensor, read_header
from quantize8.kernels.reference import INT8_MAX, as_bytes
from quantize8.limits import HEADER_BYTES, is_file
from quantize8.sources import Checkpoint
from quantize8.sources.base import BLOCK_BYTES, CONFIG_NAME, READERS
from quantize8.sources.quantized import QuantizedCheckpoint, decode
from quantize8.sources.safetensors import open_safetensors


@dataclass(frozen=True)
class Verification:
    """What was checked; everything was valid."""

    artifact: Path
    tensors: int  # number of tensors
    files: int  # number of files, without the manifest
    nbytes: int  # bytes read and compared


def verify(artifact: str | Path) -> Verification:
    """Read every byte of an artifact and compare it with the manifest.

    Args:
        artifact: The folder of the artifact.

    Returns:
        What was checked.

    Raises:
        ArtifactError: At the first file or tensor that is missing, not listed in the manifest, changed, or not allowed
            by the format.
    """
    folder = path_of(artifact)
    manifest = read_manifest(folder)
    try:
        output = make_format(manifest.format)
    except OutputError as error:
        raise ArtifactError(f"{folder / MANIFEST_NAME}: {error}") from None
    # the header of a single file is checked with its tensors
    nbytes = _check_files(folder, manifest, manifest.headers if output.is_folder else {})
    try:
        nbytes += _check_folder(folder, manifest, output) if output.is_folder else _check_gguf(folder, manifest)
    except SourceError as error:
        raise ArtifactError(str(error)) from None
    return Verification(folder, len(manifest.tensors), len(manifest.files) + len(manifest.headers), nbytes)


def _check_folder(folder: Path, manifest: Manifest, output: Format) -> int:
    """Compare the tensors of a safetensors folder with their records, and config.json with the format."""
    stored = open_safetensors(folder, {"id": folder.name}, folder.name)
    beside = open_outliers(folder) if OUTLIERS_NAME in manifest.headers else None
    apart = {} if beside is None else beside.tensors
    if stored is None or {*stored.tensors, *apart} != set(manifest.tensors):
        raise ArtifactError(f"{folder}: its weight files do not contain the tensors that {MANIFEST_NAME} lists")
    decoded = decode(stored)
    if not output.accepts(stored.config, manifest.recipe):
        where = folder / CONFIG_NAME
        raise ArtifactError(f"{where}: its quantization_config does not match the format and recipe in the manifest")
    encodings = decoded.encodings if isinstance(decoded, QuantizedCheckpoint) else {}
    codes = {encoding.tensors[0]: encoding for encoding in encodings.values()}
    records = manifest.tensors.items()
    for name, record in records:
        if (record.quantized is not None) != (name in codes):
            raise ArtifactError(f"{folder}: {name} is not quantized as {MANIFEST_NAME} says; convert the source again")
    if beside is not None:
        read_outliers(folder)

    def check(name: str) -> int:
        where = stored if beside is None or name not in apart else beside
        return _check_tensor(where, name, manifest.tensors[name], codes.get(name))

    with ThreadPoolExecutor(READERS) as pool:
        return sum(pool.map(check, manifest.tensors))


def _check_gguf(folder: Path, manifest: Manifest) -> int:
    """Compare the tensors of a GGUF file with their records; the padding between tensors must be zero."""
    if len(manifest.headers) != 1:
        raise ArtifactError(f"{folder / MANIFEST_NAME}: must list exactly one GGUF file; convert the source again")
    from quantize8.formats.gguf.architectures import FAMILIES  # the gguf package takes a while to import

    (file,) = manifest.headers
    header = read_header(folder / file, {family.name for family in FAMILIES.values()})
    tensors = _with_experts(header.tensors, manifest)
    if set(tensors) != set(manifest.tensors):
        raise ArtifactError(f"{folder / file}: does not contain the tensors that {MANIFEST_NAME} lists")
    end = header.data_offset
    with (folder / file).open("rb") as content:
        if _digest(content, 0, end) != manifest.headers[file]:
            raise ArtifactError(f"{folder / file}: changed since it was written; copy the artifact again")
        for name, tensor in sorted(tensors.items(), key=lambda item: item[1].offset):
            record = manifest.tensors[name]
            if not _is_zero(content, end, tensor.offset):
                where = f"{folder / file}: has nonzero padding before {name}"
                raise ArtifactError(f"{where}; convert the source again")
            end = tensor.offset + tensor.nbytes
            if tensor.kind != record.dtype or _digest(content, tensor.offset, end) != record.blake3:
                raise ArtifactError(f"{folder / file}: {name} changed since it was written; copy the artifact again")
        if not _is_zero(content, end, header.nbytes):
            raise ArtifactError(f"{folder / file}: has nonzero padding after its last tensor; convert the source again")
    return header.nbytes


def _with_experts(tensors: dict[str, StoredTensor], manifest: Manifest) -> dict[str, StoredTensor]:
    """The tensors of a GGUF file by name, with each expert of a tensor of its own if the manifest lists them."""
    found = {}
    for name, tensor in tensors.items():
        count = tensor.shape[0] if tensor.shape and f"{name}[0]" in manifest.tensors else 0
        if not count:
            found[name] = tensor
        for number in range(count):
            nbytes = tensor.nbytes // count
            place = tensor.offset + number * nbytes
            found[f"{name}[{number}]"] = tensor._replace(shape=tensor.shape[1:], offset=place, nbytes=nbytes)
    return found


def _digest(file: BinaryIO, start: int, stop: int) -> str:
    """BLAKE3 of the bytes from start to stop, in hexadecimal."""
    content = blake3()
    for piece in _pieces(file, start, stop):
        content.update(piece)
    return str(content.hexdigest())


def _is_zero(file: BinaryIO, start: int, stop: int) -> bool:
    return not any(any(piece) for piece in _pieces(file, start, stop))


def _pieces(file: BinaryIO, start: int, stop: int) -> Iterator[bytes]:
    file.seek(start)
    while start < stop and (piece := file.read(min(BLOCK_BYTES, stop - start))):
        yield piece
        start += len(piece)


def _check_files(folder: Path, manifest: Manifest, headers: dict[str, str]) -> int:
    """Compare small files and headers with their digests, and refuse files that the manifest does not list.

    A model card is accepted: it is written for the hub, after the artifact, and no loader reads it.
    """
    nbytes = 0
    for name, expected in [*manifest.files.items(), *headers.items()]:
        path = folder / name
        if not is_file(path):
            raise ArtifactError(f"{path}: missing; copy the artifact again, or convert its source again")
        check_inside(path, folder)
        size, found = _digest_header(path) if name in manifest.headers else _digest_file(path)
        nbytes += size
        if found != expected:
            raise ArtifactError(f"{path}: changed since it was written; copy the artifact again")
    known = {MANIFEST_NAME, CARD_NAME, *manifest.files, *manifest.headers}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        check_inside(path, folder)
        if (path.is_symlink() or not path.is_dir()) and name not in known and not name.startswith("."):
            raise ArtifactError(f"{path}: is not part of the artifact; remove it")
    return nbytes


def _digest_header(path: Path) -> tuple[int, str]:
    """Size and BLAKE3 of the length field and the header of a safetensors file."""
    with path.open("rb") as file:
        length = file.read(8)
        data = length + file.read(min(int.from_bytes(length, "little"), HEADER_BYTES))
    return len(data), digest(data)


def _digest_file(path: Path) -> tuple[int, str]:
    """Size and BLAKE3 of a file of any size."""
    content, size = blake3(), 0
    with path.open("rb") as file:
        while block := file.read(BLOCK_BYTES):
            content.update(block)
            size += len(block)
    return size, str(content.hexdigest())


def _check_tensor(stored: Checkpoint, name: str, record: TensorRecord, encoding: Encoding | None) -> int:
    """Compare one tensor with its record, and check that LLM.int8() can produce its int8 codes and scales."""
    info = stored.tensors[name]
    where = f"{stored.folder / info.file}: {name}"
    if (info.file, info.dtype, info.shape) != (record.file, record.dtype, record.shape):
        raise ArtifactError(f"{where}: its file, dtype or shape differs from its record")
    content, row = blake3(), 0
    for block in stored.blocks(name):
        content.update(as_bytes(block))
        if encoding is not None:
            _check_codes(encoding, row, row + len(block), where)
            row += len(block)
    if content.hexdigest() != record.blake3:
        raise ArtifactError(f"{where}: changed since it was written; copy the artifact again")
    return info.nbytes


def _check_codes(encoding: Encoding, start: int, stop: int, where: str) -> None:
    if isinstance(encoding, RowwiseInt8):
        codes, scales = encoding.codes(start, stop), encoding.absmax(start, stop)[:, None]
    elif isinstance(encoding, GroupwiseInt8):
        codes, scales = encoding.codes(start, stop), encoding.scales(start, stop)
    else:
        raise ArtifactError(f"{where}: is not symmetric int8 with scales by row or group; convert the source again")
    if not (np.isfinite(scales).all() and (scales >= 0).all()):
        raise ArtifactError(f"{where}: a scale is negative, NaN or infinite; convert the source again")
    if codes.size and (codes.min() < -INT8_MAX or codes.reshape(*scales.shape, -1)[scales == 0].any()):
        raise ArtifactError(f"{where}: contains codes that quantization never produces; convert the source again")
