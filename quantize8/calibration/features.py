"""Features (columns of the hidden state): where in a model they reach the outlier threshold, and which are emergent."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from quantize8.kernels.reference import Array

if TYPE_CHECKING:
    from torch import Tensor

# The criteria of LLM.int8() (Dettmers et al. 2022, arXiv:2208.07339, section 4) for emergent outlier features
EMERGENT_LAYERS = 0.25  # share of layer inputs
EMERGENT_POSITIONS = 0.06  # share of positions, averaged over all layer inputs
MAP_FEATURES = 64  # features in a FeatureMap: more than any model in the paper has emergent ones, and still readable
_DIGITS = 4  # decimals of shares and magnitudes in a FeatureMap, which holds thousands of them


@dataclass(frozen=True)
class Feature:
    """A column of the hidden state that meets the paper's criteria."""

    column: int
    layers: float  # share of layer inputs in which it reaches the threshold
    positions: float  # share of positions at which it does, averaged over all layer inputs
    max: float  # largest |x|
    max_after_first: float  # largest |x| without position 0


@dataclass(frozen=True)
class FeatureMap:
    """A map of L layer inputs by F features, sorted by how many positions reach the threshold, most first."""

    columns: list[int]  # F features, at most MAP_FEATURES of those that reach the threshold anywhere
    left_out: int  # number of features that reach it but are not in the map
    inputs: list[str]  # L names of the norms whose outputs are the layer inputs
    share: list[list[float]]  # L lists of F: share of positions with |x| >= threshold
    max: list[list[float]]  # largest |x|
    share_after_first: list[list[float]]  # both without position 0
    max_after_first: list[list[float]]


@dataclass(frozen=True)
class LayerInput:
    """Statistics of one layer input x [T, K] for each column."""

    name: str
    positions: int  # T
    counts: Array  # int64 [K], number of positions with |x| >= threshold
    peaks: Array  # float32 [K], largest |x|
    first: Array  # bool [K], whether position 0 is included in `counts`
    peaks_after_first: Array  # float32 [K], largest |x| without position 0
    over: dict[int, Array]  # for columns with a count: uint8 [ceil(T / 8)], one bit for each position

    @classmethod
    def of(cls, name: str, x: Tensor, threshold: float) -> LayerInput:
        """The statistics of x float32 [T, K]."""
        magnitudes: Array = x.abs().cpu().numpy()
        over: Array = np.asarray(magnitudes >= threshold)
        counts = over.sum(axis=0)
        bits = {int(k): np.packbits(over[:, k]) for k in np.flatnonzero(counts)}
        peaks = magnitudes.max(axis=0)
        return cls(name, len(over), counts, peaks, over[0].copy(), magnitudes[1:].max(axis=0, initial=0.0), bits)


def emergent_features(inputs: list[LayerInput]) -> list[Feature]:
    """The features that meet the paper's criteria, sorted by their share of positions, largest first.

    Only layer inputs that are `comparable` count.
    """
    inputs = comparable(inputs)
    if not inputs:
        return []
    counts = np.stack([entry.counts for entry in inputs])
    layers = (counts > 0).sum(axis=0) / len(inputs)
    # in one division, so that a share that equals the limit exactly is not rounded below it
    positions = counts.sum(axis=0) / (len(inputs) * inputs[0].positions)
    peaks = np.stack([entry.peaks for entry in inputs]).max(axis=0)
    later = np.stack([entry.peaks_after_first for entry in inputs]).max(axis=0)
    columns = np.flatnonzero((layers >= EMERGENT_LAYERS) & (positions >= EMERGENT_POSITIONS))
    features = [Feature(int(k), *(float(of[k]) for of in (layers, positions, peaks, later))) for k in columns]
    return sorted(features, key=lambda feature: -feature.positions)


def affected(inputs: list[LayerInput], features: list[Feature]) -> tuple[float, float]:
    """The shares of layer inputs and of positions at which any of these features reaches the threshold.

    These are the quantities of the paper's figure 3; the share of positions is averaged over layer inputs.
    """
    inputs = comparable(inputs)
    if not inputs:
        return 0.0, 0.0
    layers = positions = 0
    for entry in inputs:
        bits = [entry.over[feature.column] for feature in features if feature.column in entry.over]
        layers += bool(bits)
        positions += int(np.unpackbits(np.bitwise_or.reduce(bits)).sum()) if bits else 0
    return layers / len(inputs), positions / (len(inputs) * inputs[0].positions)


def feature_map(inputs: list[LayerInput]) -> FeatureMap | None:
    """The map of the features that reach the threshold anywhere; None without layer inputs."""
    inputs = comparable(inputs)
    if not inputs:
        return None
    counts = np.stack([entry.counts for entry in inputs])
    peaks = np.stack([entry.peaks for entry in inputs])
    order = np.lexsort((-peaks.max(axis=0), -counts.sum(axis=0)))
    reaching = order[: np.count_nonzero(counts.sum(axis=0))]
    chosen, count = reaching[:MAP_FEATURES], inputs[0].positions
    later = counts - np.stack([entry.first for entry in inputs])
    later_peaks = np.stack([entry.peaks_after_first for entry in inputs])
    shares = (counts / count, peaks, later / max(1, count - 1), later_peaks)
    return FeatureMap(
        chosen.tolist(),
        len(reaching) - len(chosen),
        [entry.name for entry in inputs],
        *(_rounded(matrix[:, chosen]) for matrix in shares),
    )


def comparable(inputs: list[LayerInput]) -> list[LayerInput]:
    """The layer inputs with the most common shape [T, K]; others, as of an encoder's pooler, have other features."""
    shapes = Counter((entry.positions, len(entry.counts)) for entry in inputs)
    return [entry for entry in inputs if (entry.positions, len(entry.counts)) == max(shapes, key=lambda s: shapes[s])]


def _rounded(matrix: Array) -> list[list[float]]:
    rows: list[list[float]] = np.round(matrix.astype(np.float64), _DIGITS).tolist()
    return rows
