"""The report on a model's activations, in plain numbers, so that reading it does not need torch."""

from __future__ import annotations

from dataclasses import dataclass, field

from quantize8.calibration.features import Feature, FeatureMap


@dataclass(frozen=True)
class LayerThreshold:
    """The effect of one threshold on one Linear layer [N, K]."""

    threshold: float
    columns: int  # J, the number of columns with any |x| >= threshold
    positions: float  # share of positions with any |x| >= threshold
    bytes: int  # size of these columns of the weight in 16-bit: 2 N J
    error: float | None  # expected relative error of the output in int8; None for the output head, or if not possible


@dataclass(frozen=True)
class StaticColumns:
    """The effect of storing outlier columns by calibration with the same text, on one layer or on all together."""

    columns: int  # J, the number of columns
    bytes: int  # size of the E columns of the weight that are stored exactly: 2 N E
    error: float  # expected relative error of the output with these outlier columns; for all layers, the mean


@dataclass(frozen=True)
class Choice:
    """A way to convert, with its effect on one layer or on all together.

    Attributes:
        options: The options of convert.
        error: Expected relative error of the output with the activations in int8; for all layers, the mean.
        bytes: What it adds to the weights, in bytes.
    """

    options: str
    error: float
    bytes: int = 0


@dataclass(frozen=True)
class Rotated:
    """The input [T, K] of a layer, rotated in blocks of `size` features."""

    size: int
    max: float  # largest |x|


@dataclass(frozen=True)
class LinearReport:
    """Outliers in the input [T, K] of one Linear layer."""

    module: str
    in_features: int
    out_features: int
    max: float  # largest |x|
    max_column: int
    max_after_first: float  # without position 0, which can have values of quite another size
    max_after_first_column: int
    rms: float
    columns: list[int]  # columns with any |x| >= threshold
    positions: float  # share of positions with any |x| >= threshold
    weight_error: float | None  # expected error with int8 weights and exact activations; None as in LayerThreshold
    thresholds: list[LayerThreshold]
    static: StaticColumns | None = None  # None for the output head
    rotated: Rotated | None = None  # None if no block divides K, or for the output head
    choices: list[Choice] = field(default_factory=list)  # none for the output head


@dataclass(frozen=True)
class ThresholdReport:
    """The effect of one threshold on all layers together."""

    threshold: float
    columns: int  # number of columns with an outlier, summed over layers
    bytes: int  # size of these columns of the weights in 16-bit: 2 N J, summed over layers
    error: float  # mean over layers of the expected relative error of the output
    worst_error: float  # the largest of these errors
    worst: str  # the layer that has it


@dataclass(frozen=True)
class Advice:
    """The recommended threshold for convert, or a recommendation to calibrate, with the reason in one sentence."""

    budget: float
    threshold: float
    met: bool  # whether the expected error is within the budget
    reason: str
    calibrate: bool = False  # whether calibration is recommended instead of a threshold
    command: str = ""  # the conversion with the least expected error, of all choices


@dataclass
class ActivationReport:
    """Outliers in a model's activations for a text."""

    tokens: int
    threshold: float
    linears: list[LinearReport] = field(default_factory=list)
    layer_inputs: int = 0
    emergent: list[Feature] = field(default_factory=list)
    layers_affected: float = 0.0  # share of layer inputs with an outlier in any emergent feature (the paper's figure 3)
    positions_affected: float = 0.0  # the same share of positions, averaged over layer inputs
    features: FeatureMap | None = None  # map of the features that reach the threshold; None without layer inputs
    weight_error: float = 0.0  # mean over all layers but the output head
    thresholds: list[ThresholdReport] = field(default_factory=list)  # over the same layers
    static: StaticColumns | None = None  # over the same layers
    choices: list[Choice] = field(default_factory=list)  # over the same layers
    advice: Advice | None = None
