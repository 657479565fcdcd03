"""Check an artifact: every byte against its manifest, and what the format promises of the values and of config.json."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from blake3 import blake3

from quantize8.artifact import bitsandbytes
from quantize8.artifact.manifest import MANIFEST_NAME, Manifest, TensorRecord, digest, read_manifest
from quantize8.checkpoint.base import CONFIG_NAME, READERS, read_config
from quantize8.checkpoint.safetensors import SafetensorsCheckpoint, open_safetensors
from quantize8.errors import ArtifactError, SourceError
from quantize8.ops.reference import INT8_MAX, as_bytes


@dataclass(frozen=True)
class Verification:
    """What was checked, all of it found good."""

    artifact: Path
    tensors: int
    files: int
    nbytes: int


def verify(artifact: str | Path) -> Verification:
    """Read an artifact whole and compare it with its manifest.

    Raises ArtifactError at the first file or tensor that is missing, foreign, changed, or not what its format allows.
    """
    folder = Path(artifact)
    manifest = read_manifest(folder)
    nbytes = _check_files(folder, manifest)
    try:
        checkpoint = open_safetensors(folder, {"id": folder.name}, folder.name)
        config = read_config(folder)
    except SourceError as error:
        raise ArtifactError(str(error)) from None
    if not isinstance(checkpoint, SafetensorsCheckpoint) or set(checkpoint.tensors) != set(manifest.tensors):
        raise ArtifactError(f"{folder}: its weight files do not hold the tensors that {MANIFEST_NAME} lists")
    with ThreadPoolExecutor(READERS) as pool:
        nbytes += sum(pool.map(lambda item: _check_tensor(checkpoint, *item), manifest.tensors.items()))
    expected = manifest.recipe.get("threshold")
    entry = config.get("quantization_config", {})
    if not bitsandbytes.is_int8(config) or entry.get("llm_int8_threshold") != expected:
        raise ArtifactError(
            f"{folder / CONFIG_NAME}: its quantization_config is not what the recipe in the manifest asks"
        )
    return Verification(folder, len(manifest.tensors), len(manifest.files) + len(manifest.headers), nbytes)


def _check_files(folder: Path, manifest: Manifest) -> int:
    """Compare small files and headers with their digests, and refuse files the manifest does not list."""
    nbytes = 0
    for name, expected in [*manifest.files.items(), *manifest.headers.items()]:
        path = folder / name
        if not path.is_file():
            raise ArtifactError(f"{path}: missing; copy the artifact again, or convert its source again")
        data = _header(path) if name in manifest.headers else path.read_bytes()
        nbytes += len(data)
        if digest(data) != expected:
            raise ArtifactError(f"{path}: changed since it was written; copy the artifact again")
    known = {MANIFEST_NAME, *manifest.files, *manifest.headers}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and name not in known and not name.startswith("."):
            raise ArtifactError(f"{path}: is not part of the artifact; remove it")
    return nbytes


def _header(path: Path) -> bytes:
    with path.open("rb") as file:
        length = file.read(8)
        return length + file.read(min(int.from_bytes(length, "little"), path.stat().st_size))


def _check_tensor(checkpoint: SafetensorsCheckpoint, name: str, record: TensorRecord) -> int:
    """Compare one tensor with its record; int8 codes and their scales also with what LLM.int8() can produce."""
    info = checkpoint.tensors[name]
    if (info.file, info.dtype, info.shape) != (record.file, record.dtype, record.shape):
        raise ArtifactError(
            f"{checkpoint.folder / info.file}: {name} has another place, dtype or shape than its record"
        )
    content, where = blake3(), f"{checkpoint.folder / info.file}: {name}"
    absmax = None
    if record.quantized is not None:
        module = name.removesuffix(".weight")
        bitsandbytes.check_module(checkpoint.tensors, module, checkpoint.folder / info.file)
        absmax = checkpoint.rows(f"{module}.{bitsandbytes.SCALE}", 0, info.shape[0])
        if not (np.isfinite(absmax).all() and (absmax >= 0).all()):
            raise ArtifactError(f"{where}: a scale is negative, NaN or infinite; convert the source again")
    row = 0
    for block in checkpoint.blocks(name):
        content.update(as_bytes(block))
        if absmax is not None:
            zero_rows = absmax[row : row + len(block)] == 0
            if block.size and (block.min() < -INT8_MAX or block[zero_rows].any()):
                raise ArtifactError(f"{where}: holds codes that quantizing never gives; convert the source again")
            row += len(block)
    if content.hexdigest() != record.blake3:
        raise ArtifactError(f"{where}: changed since it was written; copy the artifact again")
    return info.nbytes
