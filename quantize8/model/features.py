"""Features, the columns of the hidden state: where in a model they reach the threshold, and which are emergent."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from quantize8.ops.reference import Array

if TYPE_CHECKING:
    from torch import Tensor

EMERGENT_LAYERS = 0.25  # share of layer inputs, and
EMERGENT_POSITIONS = 0.06  # share of positions (averaged over all layer inputs): the paper's criteria
MAP_FEATURES = 64  # of a FeatureMap: more than the emergent ones of any model in the paper, and rows still to be told
_DIGITS = 4  # of shares and magnitudes in a FeatureMap, which holds thousands


@dataclass(frozen=True)
class Feature:
    """A column of the hidden state that meets the paper's criteria."""

    column: int
    layers: float  # share of layer inputs where it reaches the threshold
    positions: float  # share of positions where it does, averaged over all layer inputs
    max: float
    max_after_first: float  # without position 0


@dataclass(frozen=True)
class FeatureMap:
    """Layer inputs x features: L lists of F numbers each, the features that fill most positions first."""

    columns: list[int]  # F of them, at most MAP_FEATURES of those that reach the threshold anywhere
    left_out: int  # how many more reach it
    inputs: list[str]  # L names of the norms that layers read
    share: list[list[float]]  # of positions with |x| >= threshold
    max: list[list[float]]  # |x|
    share_after_first: list[list[float]]  # both without position 0
    max_after_first: list[list[float]]


@dataclass(frozen=True)
class LayerInput:
    """One layer input x [T, K], column by column."""

    name: str
    positions: int  # T
    counts: Array  # int64 [K], positions with |x| >= threshold
    peaks: Array  # float32 [K], largest |x|
    first: Array  # bool [K], whether position 0 is one of `counts`
    peaks_after_first: Array  # float32 [K], without position 0
    over: dict[int, Array]  # of columns with a count: uint8 [T / 8], a bit for each position

    @classmethod
    def of(cls, name: str, x: Tensor, threshold: float) -> LayerInput:
        """What is kept of x, float32 [T, K]."""
        magnitudes: Array = x.abs().cpu().numpy()
        over: Array = np.asarray(magnitudes >= threshold)
        counts = over.sum(axis=0)
        bits = {int(k): np.packbits(over[:, k]) for k in np.flatnonzero(counts)}
        peaks = magnitudes.max(axis=0)
        return cls(name, len(over), counts, peaks, over[0].copy(), magnitudes[1:].max(axis=0, initial=0.0), bits)


def emergent_features(inputs: list[LayerInput]) -> list[Feature]:
    """Features that meet the paper's criteria, those at most positions first; see `comparable` for what is left out."""
    inputs = comparable(inputs)
    if not inputs:
        return []
    counts = np.stack([entry.counts for entry in inputs])
    layers = (counts > 0).sum(axis=0) / len(inputs)
    positions = counts.sum(axis=0) / (len(inputs) * inputs[0].positions)  # one division: a limit met exactly is met
    peaks = np.stack([entry.peaks for entry in inputs]).max(axis=0)
    later = np.stack([entry.peaks_after_first for entry in inputs]).max(axis=0)
    found = np.flatnonzero((layers >= EMERGENT_LAYERS) & (positions >= EMERGENT_POSITIONS))
    features = [Feature(int(k), *(float(of[k]) for of in (layers, positions, peaks, later))) for k in found]
    return sorted(features, key=lambda feature: -feature.positions)


def affected(inputs: list[LayerInput], features: list[Feature]) -> tuple[float, float]:
    """The paper's figure 3: shares of layer inputs, and of positions averaged over them, that any of these reaches."""
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
    """Where each feature reaches the threshold, for those that do anywhere; None without layer inputs."""
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
    """The layer inputs of the shape [T, K] that most have: others (of an encoder's pooler) have other features."""
    shapes = Counter((entry.positions, len(entry.counts)) for entry in inputs)
    return [entry for entry in inputs if (entry.positions, len(entry.counts)) == max(shapes, key=lambda s: shapes[s])]


def _rounded(matrix: Array) -> list[list[float]]:
    rows: list[list[float]] = np.round(matrix.astype(np.float64), _DIGITS).tolist()
    return rows
