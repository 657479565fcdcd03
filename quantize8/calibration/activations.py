"""Outliers in the inputs of a model's Linear layers for a given text, and the features in which they occur.

Emergent outlier features are identified by the criteria of LLM.int8() (Dettmers et al. 2022, arXiv:2208.07339,
section 4): a feature (column of the hidden state) with magnitudes of at least 6 in at least 25% of the layer inputs and
at 6% of the positions or more. A layer input is the output of a norm that Linear layers or experts read: the input of
the attention or of the feed-forward block.
"""

from __future__ import annotations

import math
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from quantize8.calibration.columns import choose_columns
from quantize8.calibration.expected import (
    THRESHOLDS,
    InputError,
    WeightError,
    input_errors,
    relative_error,
    rounding_share,
    static_errors,
    weight_error,
    without,
)
from quantize8.calibration.features import LayerInput, affected, emergent_features, feature_map
from quantize8.calibration.outliers import (
    ActivationReport,
    Choice,
    LayerThreshold,
    LinearReport,
    Rotated,
    StaticColumns,
    ThresholdReport,
)
from quantize8.kernels import cpu
from quantize8.kernels.reference import DEFAULT_THRESHOLD, rotation_of
from quantize8.runtime.linear import Int8Linear

# Called with a layer's name, the layer, its input float32 [T, K] and its output float32 [T, N], both on the CPU. The
# output is None for the output head, which computes the last position only. The layer's weight can be read during the
# call, in a streamed model too.
Watcher = Callable[[str, nn.Module, Tensor, Tensor | None], None]

_RECENT_NORMS = 8  # norm outputs held to recognize what a Linear layer reads; a block applies fewer in a row


def activations(model: Any, ids: Tensor, threshold: float, layer: str = "*") -> ActivationReport:
    """Run a sequence through a model and report the outliers in the inputs of its Linear layers.

    Args:
        model: A transformers model, loaded or streamed.
        ids: Token ids int64 [T], one sequence.
        threshold: Elements with |x| >= threshold are outliers.
        layer: A glob pattern for the names of the modules to report.
    """
    recorder = _Recorder(model, threshold, layer)
    with recorder.recording(), torch.no_grad():
        # a streamed model has the device meta, and takes its inputs on the CPU
        model(ids[None] if model.device.type == "meta" else ids[None].to(model.device))
    inputs = recorder.inputs
    report = ActivationReport(len(ids), threshold, recorder.linears, len(inputs))
    report.emergent = emergent_features(inputs)
    report.layers_affected, report.positions_affected = affected(inputs, report.emergent)
    report.features = feature_map(inputs)
    _sum_up(report)
    return report


@contextmanager
def watch(model: Any, watcher: Watcher) -> Iterator[None]:
    """Call `watcher` after each Linear or Conv1D layer of a model has computed, while the context lasts.

    The output head computes the last position only: its other outputs are not needed here, and they may be the largest
    product of the model.
    """
    head = model.get_output_embeddings()
    with ExitStack() as stack:
        for name, module in linear_layers(model):
            if module is head:
                hook = module.register_forward_pre_hook(_head_watcher(name, watcher))
            else:  # before other hooks, as the one of a streamed layer drops its weight
                hook = module.register_forward_hook(_layer_watcher(name, watcher), prepend=True)
            stack.callback(hook.remove)
        yield


def linear_layers(model: Any) -> Iterator[tuple[str, nn.Module]]:
    """The Linear and Conv1D layers of a model, which `watch` sees, with their module names."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | Conv1D):
            yield name, module


def dense_weight(module: nn.Module) -> Tensor:
    """The weight of a Linear or Conv1D layer, dequantized if it is int8: float32 [N, K] on the CPU."""
    if isinstance(module, Int8Linear):
        return module.dequantize().cpu()
    stored: Any = module.weight
    weight: Tensor = stored.detach().t() if isinstance(module, Conv1D) else stored.detach()
    return weight.float().cpu()


def _rows(values: Tensor) -> Tensor:
    return values.detach().reshape(-1, values.shape[-1]).float().cpu()


def _head_watcher(name: str, watcher: Watcher) -> Callable[..., Any]:
    def note(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        watcher(name, module, _rows(inputs[0]), None)
        return (inputs[0][..., -1:, :], *inputs[1:])

    return note


def _layer_watcher(name: str, watcher: Watcher) -> Callable[..., None]:
    def note(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        watcher(name, module, _rows(inputs[0]), _rows(output))

    return note


@dataclass
class _Input:
    """An input float32 [T, K] that several layers may share, as the query, key and value layers do."""

    values: Tensor  # a reference, so that no later tensor reuses its memory
    version: int
    energy: Tensor  # float64 [K], sum of x^2
    errors: list[InputError]
    size: int  # of the blocks of features that can be rotated; 0 for none

    @cached_property
    def turned(self) -> Tensor:
        """The input rotated, float32 [T, K]."""
        return torch.from_numpy(cpu.rotate(self.values.numpy(), self.size))

    @cached_property
    def shares(self) -> tuple[float | None, float | None]:
        """`rounding_share` of the input, and of the input rotated."""
        return rounding_share(self.values), rounding_share(self.turned) if self.size else None


@dataclass
class _NormOutput:
    name: str
    values: Tensor  # a reference, as above
    counted: bool = False  # whether it has been counted as a layer input


class _Recorder:
    """Records the outliers in each Linear layer's input, and the layer inputs, during one forward pass."""

    def __init__(self, model: Any, threshold: float, layer: str) -> None:
        self.linears: list[LinearReport] = []
        self.inputs: list[LayerInput] = []
        self._model, self._threshold, self._layer = model, threshold, layer
        self._norms: deque[_NormOutput] = deque(maxlen=_RECENT_NORMS)
        self._last: _Input | None = None

    @contextmanager
    def recording(self) -> Iterator[None]:
        head = self._model.get_output_embeddings()
        with ExitStack() as stack:
            for name, module in self._model.named_modules():
                if "norm" in type(module).__name__.lower():
                    stack.callback(module.register_forward_hook(self._norm_noter(name)).remove)
                elif module is not head and (isinstance(module, nn.Linear | Conv1D) or _holds_experts(module)):
                    stack.callback(module.register_forward_pre_hook(self._note_layer_input).remove)
            stack.enter_context(watch(self._model, self._note_linear))
            yield

    def _norm_noter(self, name: str) -> Callable[..., None]:
        def note(_module: Any, _inputs: Any, output: Any) -> None:
            if isinstance(output, Tensor):  # norms that also return a residual are not recognized
                self._norms.append(_NormOutput(name, output))

        return note

    def _note_layer_input(self, _module: Any, inputs: tuple[Any, ...]) -> None:
        """Count x as a layer input if it is the output of a norm and no layer has read it before."""
        x = inputs[0]
        for norm in self._norms:
            if norm.values.data_ptr() == x.data_ptr() and norm.values.numel() == x.numel():
                if not norm.counted:
                    self.inputs.append(LayerInput.of(norm.name, _rows(x), self._threshold))
                norm.counted = True
                return

    def _note_linear(self, name: str, module: nn.Module, x: Tensor, y: Tensor | None) -> None:
        if not fnmatchcase(name, self._layer):
            return
        magnitudes, known = x.abs(), self._input(x)
        over, peaks = magnitudes >= self._threshold, magnitudes.amax(0)
        later = magnitudes[1:].amax(0) if len(x) > 1 else torch.zeros_like(peaks)
        found = _output_errors(known, module, y)
        width: Any = module.nf if isinstance(module, Conv1D) else module.out_features
        self.linears.append(
            LinearReport(
                module=name,
                in_features=x.shape[1],
                out_features=width,
                max=float(peaks.max()),
                max_column=int(peaks.argmax()),
                max_after_first=float(later.max()),
                max_after_first_column=int(later.argmax()),
                rms=math.sqrt(float(known.energy.sum()) / x.numel()),
                columns=over.any(0).nonzero().flatten().tolist(),
                positions=float(over.any(1).double().mean()),
                weight_error=found.weight,
                thresholds=[
                    LayerThreshold(entry.threshold, entry.columns, entry.positions, 2 * width * entry.columns, error)
                    for entry, error in zip(known.errors, found.thresholds, strict=True)
                ],
                static=found.static,
                rotated=Rotated(known.size, float(known.turned.abs().max())) if known.size and y is not None else None,
                choices=found.choices,
            )
        )

    def _input(self, x: Tensor) -> _Input:
        last = self._last
        if last is None or (last.values.data_ptr(), last.values.shape, last.version) != (
            x.data_ptr(), x.shape, x._version,
        ):  # fmt: skip
            size = rotation_of(x.shape[1])
            self._last = last = _Input(x, x._version, x.square().sum(0).double(), input_errors(x), size)
        return last


@dataclass
class _OutputErrors:
    """Expected relative errors of a layer's output; None or empty where they cannot be computed."""

    thresholds: list[float | None]  # at each threshold
    weight: float | None = None  # from the weight alone
    static: StaticColumns | None = None  # with stored columns
    choices: list[Choice] = field(default_factory=list)


def _output_errors(known: _Input, module: Any, y: Tensor | None) -> _OutputErrors:
    """The expected errors of a layer; nothing without y, and where the weight cannot be quantized to int8."""
    nothing = _OutputErrors([None] * len(known.errors))
    if y is None:
        return nothing
    weight = dense_weight(module)
    rounded = weight_error(weight)
    if not rounded.squares.isfinite().all():
        return nothing
    product = y if module.bias is None else y - module.bias.cpu()
    y_energy = float(torch.linalg.vector_norm(product, dtype=torch.float64)) ** 2
    squares: list[Tensor | float] = [0.0, *(entry.squares for entry in known.errors)]
    errors = [relative_error(entry, known.energy, rounded, y_energy) for entry in squares]
    columns, exact = choose_columns(known.values, rounded)
    left = without(rounded, columns[:exact])
    error = relative_error(static_errors(known.values, columns), known.energy, left, y_energy)
    static = StaticColumns(len(columns), 2 * len(weight) * exact, error)
    return _OutputErrors([*errors[1:]], errors[0], static, _choices(known, weight, rounded, y_energy, static))


def _choices(
    known: _Input, weight: Tensor, rounded: WeightError, y_energy: float, static: StaticColumns
) -> list[Choice]:
    """The ways to convert a layer, and what each leaves of error."""
    published = next(entry.squares for entry in known.errors if entry.threshold == DEFAULT_THRESHOLD)
    ways: list[tuple[str, Tensor, Tensor, WeightError, float | None]] = [
        (f"--threshold {DEFAULT_THRESHOLD:g}", published, known.energy, rounded, 1.0),
        ("--calibrate FILE --rounding gptq", published, known.energy, rounded, known.shares[0]),
    ]
    if known.size:
        turned = known.turned
        plain, energy = static_errors(turned, torch.zeros(0, dtype=torch.long)), turned.square().sum(0).double()
        turned_weight = weight_error(torch.from_numpy(cpu.rotate(weight.contiguous().numpy(), known.size)))
        ways += [
            ("--rotate", plain, energy, turned_weight, 1.0),
            ("--rotate --calibrate FILE --rounding gptq", plain, energy, turned_weight, known.shares[1]),
        ]
    found = [Choice("--calibrate FILE", static.error, static.bytes)]
    for options, of_input, energy, of_weight, share in ways:
        if share is not None:
            left = WeightError(of_weight.energy, of_weight.squares * share)
            found.append(Choice(options, relative_error(of_input, energy, left, y_energy)))
    return found


def _holds_experts(module: nn.Module) -> bool:
    """Whether a module holds experts as transformers joins them, in tensors [E, N, K]."""
    return any(value is not None and value.dim() == 3 for value in module._parameters.values())


def _sum_up(report: ActivationReport) -> None:
    """Fill in the figures of a report over all layers but the output head, at each threshold."""
    judged = [entry for entry in report.linears if entry.weight_error is not None]
    if not judged:
        return
    report.weight_error = sum(entry.weight_error or 0.0 for entry in judged) / len(judged)
    static = [entry.static for entry in judged if entry.static is not None]
    report.static = StaticColumns(
        columns=sum(entry.columns for entry in static),
        bytes=sum(entry.bytes for entry in static),
        error=sum(entry.error for entry in static) / len(static),
    )
    by_options: dict[str, list[Choice]] = defaultdict(list)
    for choice in (choice for entry in judged for choice in entry.choices):
        by_options[choice.options].append(choice)
    report.choices = [  # those that every layer has
        Choice(options, sum(each.error for each in found) / len(found), sum(each.bytes for each in found))
        for options, found in by_options.items()
        if len(found) == len(judged)
    ]
    for i, threshold in enumerate(THRESHOLDS):
        layers = [entry.thresholds[i] for entry in judged]
        errors = [layer.error or 0.0 for layer in layers]
        worst = errors.index(max(errors))
        report.thresholds.append(
            ThresholdReport(
                threshold=threshold,
                columns=sum(layer.columns for layer in layers),
                bytes=sum(layer.bytes for layer in layers),
                error=sum(errors) / len(errors),
                worst_error=errors[worst],
                worst=judged[worst].module,
            )
        )
