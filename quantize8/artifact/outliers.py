"""outliers.safetensors: the outlier columns of each int8 weight, chosen on a calibration text, and input statistics.

The file is next to the weight files but not listed in their index, so other loaders ignore it: they see the artifact
that a conversion without calibration would write, byte for byte.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from quantize8.errors import ArtifactError
from quantize8.formats.base import OutTensor
from quantize8.kernels.reference import Array
from quantize8.kernels.scales import ScaleSearch
from quantize8.sources.base import TensorInfo, contained
from quantize8.sources.safetensors import SafetensorsCheckpoint

OUTLIERS_NAME = "outliers.safetensors"
PART_SUFFIX = ".outliers"  # of the files, one per weight file, that are merged into it at the end
_COLUMNS, _WEIGHT = "outlier_columns", "outlier_weight"
_MEAN_SQUARE, _ABSMAX = "input_mean_square", "input_absmax"
_KINDS = {_COLUMNS: ("I32", 1), _MEAN_SQUARE: ("F32", 1), _ABSMAX: ("F32", 1), _WEIGHT: ("F16", 2)}  # dtype, dimensions


@dataclass(frozen=True)
class Calibrated:
    """The result of calibration for one weight [N, K]."""

    columns: Array  # int32 [J], outlier columns, most important first
    exact: int  # E <= J: this many of the first columns are also stored exactly
    mean_square: Array  # float32 [K], mean square of the layer input over the text
    absmax: Array  # float32 [K], largest magnitude of the layer input over the text

    @property
    def search(self) -> ScaleSearch:
        """The scale search with the statistics of the text."""
        return ScaleSearch(self.mean_square, self.columns[: self.exact])

    def tensors(self, module: str, rows: int) -> list[OutTensor]:
        """The tensors that are stored for a module whose weight has `rows` rows; the exact columns come last."""
        wide = (len(self.mean_square),)
        return [
            OutTensor(f"{module}.{_COLUMNS}", "I32", (len(self.columns),)),
            OutTensor(f"{module}.{_MEAN_SQUARE}", "F32", wide),
            OutTensor(f"{module}.{_ABSMAX}", "F32", wide),
            OutTensor(f"{module}.{_WEIGHT}", "F16", (rows, self.exact)),
        ]

    def values(self) -> list[Array]:
        """The values of `tensors` except the last one."""
        return [self.columns.astype(np.int32), self.mean_square, self.absmax]

    def exact_rows(self, block: Array) -> Array:
        """Extract the exact columns from weight rows [n, K], as float16 [n, E]."""
        chosen = block[:, self.columns[: self.exact]].astype(np.float32)
        return np.ascontiguousarray(chosen.astype(np.float16))


@dataclass(frozen=True)
class StoredOutliers:
    """The stored outlier columns of a weight [N, K].

    Attributes:
        columns: Indices of the outlier columns, int32 [J].
        weight: Exact values of the first E columns, float16 [N, E].
    """

    columns: Array
    weight: Array


def has_outliers(folder: Path) -> bool:
    """Whether an artifact was calibrated."""
    return (folder / OUTLIERS_NAME).is_file()


def open_outliers(folder: Path) -> SafetensorsCheckpoint:
    """Open outliers.safetensors of an artifact."""
    contained(folder / OUTLIERS_NAME, folder)
    return SafetensorsCheckpoint(folder, [OUTLIERS_NAME], {"id": folder.name}, folder.name)


def read_outliers(folder: Path) -> dict[str, StoredOutliers]:
    """Read the outlier columns of each module.

    Args:
        folder: The artifact.

    Returns:
        Module -> its outlier columns.

    Raises:
        ArtifactError: The tensors of a module are incomplete or invalid.
    """
    stored = open_outliers(folder)
    modules: dict[str, dict[str, TensorInfo]] = {}
    for name, info in stored.tensors.items():
        module, _, last = name.rpartition(".")
        modules.setdefault(module, {})[last] = info
    return {module: _module(stored, module, found) for module, found in modules.items()}


def _module(stored: SafetensorsCheckpoint, module: str, found: dict[str, TensorInfo]) -> StoredOutliers:
    where = f"{stored.folder / OUTLIERS_NAME}: {module}"
    if {last: (info.dtype, len(info.shape)) for last, info in found.items()} != _KINDS:
        raise ArtifactError(f"{where} does not have the tensors of a calibration; convert the source again")
    columns, weight = (stored.rows(found[last].name, 0, found[last].shape[0]) for last in (_COLUMNS, _WEIGHT))
    width, count = found[_MEAN_SQUARE].shape[0], len(columns)
    inside = bool(((columns >= 0) & (columns < width)).all()) and len(np.unique(columns)) == count
    if not inside or weight.shape[1] > count or found[_ABSMAX].shape != (width,) or not np.isfinite(weight).all():
        raise ArtifactError(f"{where} lists invalid outlier columns; convert the source again")
    return StoredOutliers(columns, weight)
