"""The manifest, quantize8.json: an artifact's contents, its source, and digests of every byte. It is written last.

The manifest depends only on the source and its name, the recipe, the requested file size and the version of quantize8
(for GGUF also on transformers, which provides the tokenizer). Two conversions of the same source therefore produce the
same bytes, regardless of the machine, the number of workers and the order of the work. Digests are BLAKE3.
"""

from __future__ import annotations

import json
from collections.abc import Hashable
from dataclasses import asdict, dataclass, field, is_dataclass
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Any, cast, get_args, get_origin, get_type_hints

import numpy as np
from blake3 import blake3

from quantize8 import limits
from quantize8.errors import ArtifactError, SourceError
from quantize8.kernels import ABSMAX, NEAREST
from quantize8.kernels.reference import ColumnStats
from quantize8.sources.base import contained

MANIFEST_NAME = "quantize8.json"
CHECK_FAILED = "check-failed.txt"  # in an artifact that failed `convert --check`: contains the reason
FORMAT_VERSION = 1
_DIGITS = 8  # of an error, after the point
_WORST_COLUMNS = 8  # as many as fit on one line of a report
_DIGEST = "manifest_blake3"
_LARGEST = 2**63  # limit for integers, which can have any number of digits in JSON


@dataclass
class Quantized:
    """The result of quantizing one weight [N, K]."""

    source_dtype: str
    source_blake3: str  # digest of the values as read, row-major
    relative_error: float  # ||w - dequantized||_F / ||w||_F
    absmax_range: tuple[float, float]  # smallest and largest absmax of a row
    outliers: int  # weights beyond 6 standard deviations of their row
    worst_columns: list[tuple[int, int, float]]  # (input column, its outliers, its largest |w|), most outliers first
    transposed: bool = False  # stored [in, out] in the source (GPT-2's Conv1D)
    scale: str = ABSMAX  # or mse, if scales were searched
    rounding: str = NEAREST  # or gptq, if codes were chosen by the output's error


@dataclass
class TensorRecord:
    """One tensor of the artifact."""

    file: str
    dtype: str
    shape: tuple[int, ...]
    blake3: str
    quantized: Quantized | None = None


@dataclass
class Manifest:
    """The contents of quantize8.json."""

    version: str  # of quantize8
    format: str
    source: dict[str, str]
    recipe: dict[str, Any]
    source_bytes: int  # size of the source weights
    tensors: dict[str, TensorRecord] = field(default_factory=dict)
    kept: dict[str, str] = field(default_factory=dict)  # Linear weights and large tensors left in float -> reason
    headers: dict[str, str] = field(default_factory=dict)  # weight file -> digest of its header
    files: dict[str, str] = field(default_factory=dict)  # every other file -> digest
    calibration: dict[str, Any] = field(default_factory=dict)  # text and options of calibration; empty without
    closed_to: dict[str, str] = field(default_factory=dict)  # loader of the format that cannot open it -> reason

    def to_bytes(self) -> bytes:
        """The contents of the file, which end with a digest of everything before it."""
        value: dict[str, Any] = {"format_version": FORMAT_VERSION, **asdict(self)}
        for name in ("calibration", "closed_to"):
            if not value[name]:
                del value[name]
        for record in value["tensors"].values():
            if record["quantized"] is None:
                del record["quantized"]
                continue
            for name, usual in (("scale", ABSMAX), ("rounding", NEAREST)):
                if record["quantized"][name] == usual:
                    del record["quantized"][name]
        value["tensors"] = dict(sorted(value["tensors"].items()))
        value[_DIGEST] = _digest_of(value)
        return _laid_out(value)


def digest(data: bytes | memoryview) -> str:
    """The BLAKE3 digest of some bytes, in hexadecimal."""
    return str(blake3(data).hexdigest())


def summarize(
    stats: ColumnStats,
    absmax: Any,
    source_dtype: str,
    source_blake3: str,
    transposed: bool,
    scale: str = ABSMAX,
    rounding: str = NEAREST,
) -> Quantized:
    """Summarize the statistics of a quantized weight [N, K].

    Args:
        stats: Complete statistics by input column.
        absmax: Largest magnitude of each row, float32 [N].
        source_dtype: Dtype in the source.
        source_blake3: Digest of the values as read.
        transposed: Whether the source stores the weight as [in, out].
        scale: How scales were chosen, absmax or mse.
        rounding: How codes were chosen, nearest or gptq.

    Returns:
        The record for the manifest, with the error rounded to its significant digits, but not to 0 unless it is 0.
    """
    square, error = float(stats.sum_square.sum()), float(stats.sum_error.sum())
    relative = max(round((error / square) ** 0.5, _DIGITS), 10**-_DIGITS) if error and square else 0.0
    order = np.lexsort((np.arange(len(stats.absmax)), -stats.absmax, -stats.outliers))[:_WORST_COLUMNS]
    return Quantized(
        source_dtype=source_dtype,
        source_blake3=source_blake3,
        relative_error=relative,
        absmax_range=(float(absmax.min(initial=np.inf)), float(absmax.max(initial=0))) if len(absmax) else (0.0, 0.0),
        outliers=int(stats.outliers.sum()),
        worst_columns=[(int(k), int(stats.outliers[k]), float(stats.absmax[k])) for k in order],
        transposed=transposed,
        scale=scale,
        rounding=rounding,
    )


def read_manifest(folder: Path) -> Manifest:
    """Read the manifest of an artifact and check it against its own digest, which covers every byte.

    Raises:
        ArtifactError: There is no manifest, it was changed, a field has the wrong type or names a file outside the
            artifact, or `convert --check` found the artifact broken.
    """
    path = folder / MANIFEST_NAME
    if not path.is_file():
        raise ArtifactError(f"{folder}: no {MANIFEST_NAME}, so not a finished artifact; convert the source again")
    if (folder / CHECK_FAILED).is_file():
        reason = limits.read_bytes(folder / CHECK_FAILED, limits.CONFIG_BYTES, ArtifactError).decode(errors="replace")
        raise ArtifactError(f"{folder}: failed the check when it was made ({reason.strip()}); convert the source again")
    check_inside(path, folder)
    data = limits.read_bytes(path, limits.MANIFEST_BYTES, ArtifactError)
    value = limits.parse_object(data, path, ArtifactError)
    try:
        if value["format_version"] != FORMAT_VERSION:
            raise ArtifactError(f"{path}: written by another version of quantize8; use that version, or convert again")
        expected = value.pop(_DIGEST)
        if expected != _digest_of(value) or data != _laid_out({**value, _DIGEST: expected}):
            raise ArtifactError(f"{path}: does not match its own digest; it was changed after it was written")
        del value["format_version"]
        tensors = {name: record_of(entry) for name, entry in value.pop("tensors").items()}
        manifest = Manifest(**value, tensors=tensors)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ArtifactError(f"{path}: not readable as a manifest ({error}); convert the source again") from None
    files = {*manifest.files, *manifest.headers} if fits(manifest, Manifest) else {""}
    if not all(map(is_inside, files)) or not {record.file for record in manifest.tensors.values()} <= files:
        raise ArtifactError(f"{path}: has fields of the wrong type, or names files outside; convert the source again")
    return manifest


def files_of(data: bytes) -> list[str]:
    """The files that a manifest lists; none if the data is not a complete manifest."""
    try:
        value = json.loads(data)
        return [name for name in (*value["headers"], *value["files"]) if is_inside(name)]
    except (ValueError, KeyError, TypeError):
        return []


def check_inside(path: Path, folder: Path) -> None:
    """Raise ArtifactError if a file of an artifact is a link that leads outside it."""
    try:
        contained(path, folder)
    except SourceError:
        raise ArtifactError(f"{path}: is a link to outside the artifact; copy the artifact again") from None


def is_inside(name: str) -> bool:
    """Whether a name is a normalized relative path of a file inside the artifact."""
    path = PurePosixPath(name)
    return name.isprintable() and str(path) == name and not path.is_absolute() and not {"..", "."} & set(path.parts)


@cache  # a manifest can have a hundred thousand records
def _hints(kind: Any) -> dict[str, Any]:
    return get_type_hints(kind)


def fits(value: Any, kind: Any) -> bool:
    """Whether a value read from JSON has the type of an annotation; an integer is accepted as a float.

    Args:
        value: The value.
        kind: The annotation: a dataclass, a container of other annotations, X | None, or a plain type.
    """
    origin, inner = get_origin(kind), get_args(kind)
    if kind is Any:
        return True
    if is_dataclass(kind):
        return type(value) is kind and all(
            fits(getattr(value, name), each) for name, each in _hints(cast("Hashable", kind)).items()
        )
    if origin is dict:
        return type(value) is dict and all(fits(key, inner[0]) and fits(each, inner[1]) for key, each in value.items())
    if origin is list or (origin is tuple and inner[-1] is ...):
        return type(value) is origin and all(fits(each, inner[0]) for each in value)
    if origin is tuple:
        return type(value) is tuple and len(value) == len(inner) and all(map(fits, value, inner))
    if origin is not None:  # X | None
        return any(fits(value, each) for each in inner)
    if type(value) is int and abs(value) > _LARGEST:
        return False
    return type(value) in (int, float) if kind is float else type(value) is kind


def record_of(entry: dict[str, Any]) -> TensorRecord:
    """Make a record from its JSON object; raises KeyError or TypeError if fields are missing or unknown."""
    quantized = entry.pop("quantized", None)
    if quantized is not None:
        quantized = Quantized(
            **{
                **quantized,
                "absmax_range": tuple(quantized["absmax_range"]),
                "worst_columns": [tuple(column) for column in quantized["worst_columns"]],
            }
        )
    return TensorRecord(**{**entry, "shape": tuple(entry["shape"])}, quantized=quantized)


def _laid_out(value: dict[str, Any]) -> bytes:
    """The canonical JSON text of the manifest: one member per line, without NaN."""
    return json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False).encode() + b"\n"


def _digest_of(value: dict[str, Any]) -> str:
    return digest(json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode())
