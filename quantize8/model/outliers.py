"""What is reported of activations, in plain numbers, so that a report needs no torch."""

from __future__ import annotations

from dataclasses import dataclass, field

from quantize8.model.features import Feature, FeatureMap


@dataclass(frozen=True)
class LayerThreshold:
    """What one threshold does to one Linear layer."""

    threshold: float
    columns: int  # J, with some |x| >= threshold
    positions: float  # share of positions with some |x| >= threshold
    bytes: int  # of J columns of the weight in 16-bit: 2 N J
    error: float | None  # expected, relative, of an int8 output; None of the output head, or if it cannot be int8


@dataclass(frozen=True)
class StaticColumns:
    """What outlier columns that calibration by the same text stores would do: to one layer, or all together."""

    columns: int  # J
    bytes: int  # of those of them that are stored exactly: 2 N E
    error: float  # expected relative error of the output with these columns alone; of all layers, the mean


@dataclass(frozen=True)
class LinearReport:
    """Outliers in the input of one Linear layer, [T, K]."""

    module: str
    in_features: int
    out_features: int
    max: float
    max_column: int
    max_after_first: float  # without position 0, whose values can be of another kind
    max_after_first_column: int
    rms: float
    columns: list[int]  # with some |x| >= threshold
    positions: float  # share of positions with some |x| >= threshold
    weight_error: float | None  # expected, of int8 weights and exact activations; None as of a threshold
    thresholds: list[LayerThreshold]
    static: StaticColumns | None = None  # None of the output head


@dataclass(frozen=True)
class ThresholdReport:
    """What a threshold does to all layers together."""

    threshold: float
    columns: int  # with an outlier, summed over the layers
    bytes: int  # that these columns of the weights take in 16-bit: 2 N J, summed
    error: float  # expected relative error of the layers' outputs, mean
    worst_error: float
    worst: str  # the layer that has it


@dataclass(frozen=True)
class Advice:
    """A threshold for convert, or calibrated columns in its place, and one sentence that says why."""

    budget: float
    threshold: float
    met: bool  # whether the advice keeps to the budget
    reason: str
    calibrate: bool = False  # whether columns stored by calibration are advised, and no threshold


@dataclass
class ActivationReport:
    """Outliers that a text brings about."""

    tokens: int
    threshold: float
    linears: list[LinearReport] = field(default_factory=list)
    layer_inputs: int = 0
    emergent: list[Feature] = field(default_factory=list)
    layers_affected: float = 0.0  # share of layer inputs with an outlier in any emergent feature, and
    positions_affected: float = 0.0  # share of positions, averaged over layer inputs: the paper's figure 3
    features: FeatureMap | None = None  # of all features that reach the threshold anywhere; None without layer inputs
    weight_error: float = 0.0  # of all layers but the output head, the mean of theirs
    thresholds: list[ThresholdReport] = field(default_factory=list)  # the same layers
    static: StaticColumns | None = None  # the same layers
    advice: Advice | None = None
