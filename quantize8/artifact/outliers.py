"""outliers.safetensors: the columns of each int8 weight that a calibration text makes outliers, and why these.

It lies beside the weight files, outside of their index, so that other loaders do not read it: to them the artifact is
the one that is written without calibration, byte for byte.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from quantize8.checkpoint.base import TensorInfo, contained
from quantize8.checkpoint.safetensors import SafetensorsCheckpoint
from quantize8.errors import ArtifactError
from quantize8.formats.base import OutTensor
from quantize8.ops.reference import Array
from quantize8.ops.scales import ScaleSearch

OUTLIERS_NAME = "outliers.safetensors"
PART_SUFFIX = ".outliers"  # of the files, one for each weight file, that are merged into it at the end
_COLUMNS, _WEIGHT = "outlier_columns", "outlier_weight"
_MEAN_SQUARE, _ABSMAX = "input_mean_square", "input_absmax"
_KINDS = {_COLUMNS: ("I32", 1), _MEAN_SQUARE: ("F32", 1), _ABSMAX: ("F32", 1), _WEIGHT: ("F16", 2)}  # dtype, dimensions


@dataclass(frozen=True)
class Calibrated:
    """What calibration says of one weight [N, K]."""

    columns: Array  # int32 [J], outlier columns, the most important first
    exact: int  # E <= J: the first so many are stored exactly too
    mean_square: Array  # float32 [K], of the layer's input over the text
    absmax: Array  # float32 [K], largest magnitude of the same

    @property
    def search(self) -> ScaleSearch:
        """What scales that fit the text are searched for."""
        return ScaleSearch(self.mean_square, self.columns[: self.exact])

    def tensors(self, module: str, rows: int) -> list[OutTensor]:
        """What is stored of it, the exact columns last."""
        wide = (len(self.mean_square),)
        return [
            OutTensor(f"{module}.{_COLUMNS}", "I32", (len(self.columns),)),
            OutTensor(f"{module}.{_MEAN_SQUARE}", "F32", wide),
            OutTensor(f"{module}.{_ABSMAX}", "F32", wide),
            OutTensor(f"{module}.{_WEIGHT}", "F16", (rows, self.exact)),
        ]

    def values(self) -> list[Array]:
        """Values of `tensors` but the last."""
        return [self.columns.astype(np.int32), self.mean_square, self.absmax]

    def exact_rows(self, block: Array) -> Array:
        """Of rows [n, K] of the weight the exact columns, float16 [n, E]."""
        chosen = block[:, self.columns[: self.exact]].astype(np.float32)
        return np.ascontiguousarray(chosen.astype(np.float16))


@dataclass(frozen=True)
class StoredOutliers:
    """Outlier columns of one weight [N, K] in an artifact: int32 [J], and float16 [N, E] of the first E of them."""

    columns: Array
    weight: Array


def has_outliers(folder: Path) -> bool:
    """Whether an artifact was calibrated."""
    return (folder / OUTLIERS_NAME).is_file()


def open_outliers(folder: Path) -> SafetensorsCheckpoint:
    """The file's tensors."""
    contained(folder / OUTLIERS_NAME, folder)
    return SafetensorsCheckpoint(folder, [OUTLIERS_NAME], {"id": folder.name}, folder.name)


def read_outliers(folder: Path) -> dict[str, StoredOutliers]:
    """The outlier columns of each module; raises ArtifactError where they are not what this module writes."""
    stored = open_outliers(folder)
    modules: dict[str, dict[str, TensorInfo]] = {}
    for name, info in stored.tensors.items():
        module, _, last = name.rpartition(".")
        modules.setdefault(module, {})[last] = info
    return {module: _module(stored, module, found) for module, found in modules.items()}


def _module(stored: SafetensorsCheckpoint, module: str, found: dict[str, TensorInfo]) -> StoredOutliers:
    where = f"{stored.folder / OUTLIERS_NAME}: {module}"
    if {last: (info.dtype, len(info.shape)) for last, info in found.items()} != _KINDS:
        raise ArtifactError(f"{where} has other tensors than a calibration's; convert the source again")
    columns, weight = (stored.rows(found[last].name, 0, found[last].shape[0]) for last in (_COLUMNS, _WEIGHT))
    width, count = found[_MEAN_SQUARE].shape[0], len(columns)
    inside = bool(((columns >= 0) & (columns < width)).all()) and len(np.unique(columns)) == count
    if not inside or weight.shape[1] > count or found[_ABSMAX].shape != (width,) or not np.isfinite(weight).all():
        raise ArtifactError(f"{where} lists columns that cannot be; convert the source again")
    return StoredOutliers(columns, weight)
