"""Outlier statistics: of the weights of a checkpoint or artifact, or of the activations that a text brings about.

Emergent outlier features are told by the criteria of LLM.int8() (section 4): a feature (column of the hidden state)
with magnitudes of at least 6 in at least 25% of the layer inputs and at 6% of the positions. A layer input is the
output of a norm that Linear layers read: the inputs of the attention and of the feed-forward block.
"""

from __future__ import annotations

import math
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from quantize8.artifact.manifest import MANIFEST_NAME, read_manifest, summarize
from quantize8.checkpoint import Checkpoint, open_checkpoint
from quantize8.checkpoint.base import QUANTIZABLE, READERS
from quantize8.checkpoint.structure import CONV1D, read_structure
from quantize8.errors import SourceError
from quantize8.model.text import read_text
from quantize8.ops import cpu
from quantize8.ops.reference import DEFAULT_THRESHOLD, STATS_TILE_ROWS, Array, ColumnStats

if TYPE_CHECKING:
    from torch import Tensor

EMERGENT_LAYERS = 0.25  # share of layer inputs, and
EMERGENT_POSITIONS = 0.06  # share of positions (averaged over all layer inputs): the paper's criteria
DEFAULT_TOKENS = 1024
_RECENT_NORMS = 8  # norm outputs kept to recognize what a Linear reads; a block applies fewer in a row


@dataclass(frozen=True)
class WeightReport:
    """Statistics of one Linear weight."""

    module: str
    dtype: str  # as stored: F16, BF16, F32, I8 and others
    shape: tuple[int, int]  # [N, K]
    absmax: float
    rms: float
    outliers: int  # weights beyond 6 standard deviations of their row
    relative_error: float | None  # of int8: made now for a checkpoint, from the manifest for an artifact
    worst_columns: list[tuple[int, int, float]]  # input column, its outliers, its largest |w|


@dataclass(frozen=True)
class LinearReport:
    """Outliers in the input of one Linear layer, [T, K]."""

    module: str
    in_features: int
    max: float
    max_column: int
    columns: list[int]  # with some |x| >= threshold
    positions: float  # share of positions with some |x| >= threshold


@dataclass(frozen=True)
class Feature:
    """A column of the hidden state that meets the paper's criteria."""

    column: int
    layers: float  # share of layer inputs where it reaches the threshold
    positions: float  # share of positions where it does, averaged over all layer inputs
    max: float


@dataclass
class ActivationReport:
    """Outliers that a text brings about."""

    tokens: int
    threshold: float
    linears: list[LinearReport] = field(default_factory=list)
    layer_inputs: int = 0
    emergent: list[Feature] = field(default_factory=list)


def inspect(
    model: str,
    *,
    text: str | Path | None = None,
    threshold: float = DEFAULT_THRESHOLD,
    layer: str = "*",
    tokens: int = DEFAULT_TOKENS,
    revision: str | None = None,
    token: str | None = None,
) -> list[WeightReport] | ActivationReport:
    """Statistics of weights, or with `text` of the activations over its first `tokens` tokens.

    Args: model, a checkpoint or artifact; text, a file in UTF-8; threshold, an outlier has |x| >= it; layer, a glob of
    module names to report.
    Raises: SourceError where the model or the text cannot be read, or no module has such a name.
    """
    if not threshold > 0:
        raise SourceError(f"threshold {threshold:g}: must be positive, for an outlier is what reaches it")
    if text is not None:
        return _inspect_text(model, Path(text), threshold, layer, tokens, revision, token)
    checkpoint = open_checkpoint(model, revision=revision, token=token)
    errors = _known_errors(checkpoint.folder) if checkpoint.decoded else {}
    modules = _linear_modules(checkpoint)
    chosen = _matching(list(modules), layer, model)
    with ThreadPoolExecutor(READERS) as pool:
        return list(pool.map(lambda name: _weight_report(checkpoint, name, modules[name], errors.get(name)), chosen))


def activations(model: Any, ids: Tensor, threshold: float, layer: str = "*") -> ActivationReport:
    """Outliers in the inputs of a loaded model's Linear layers over token ids [T], one sequence."""
    import torch

    recorder = _Recorder(model, threshold)
    with recorder, torch.inference_mode():
        model(ids[None].to(model.device))
    report = ActivationReport(len(ids), threshold, layer_inputs=len(recorder.inputs))
    report.linears = [entry for entry in recorder.linears if fnmatchcase(entry.module, layer)]
    report.emergent = emergent_features(recorder.inputs)
    return report


def emergent_features(layer_inputs: list[tuple[Array, Array]]) -> list[Feature]:
    """Features that meet the paper's criteria.

    Args: for each layer input, the share of positions at which each column reaches the threshold, and each column's
    largest magnitude, both [K]. Inputs of another width than most are left out.
    """
    if not layer_inputs:
        return []
    widths = [len(share) for share, _ in layer_inputs]
    width = max(set(widths), key=widths.count)
    shares = np.stack([share for share, _ in layer_inputs if len(share) == width])
    peaks = np.stack([peak for _, peak in layer_inputs if len(peak) == width]).max(axis=0)
    layers, positions = (shares > 0).mean(axis=0), shares.mean(axis=0)
    found = np.flatnonzero((layers >= EMERGENT_LAYERS) & (positions >= EMERGENT_POSITIONS))
    features = [Feature(int(k), float(layers[k]), float(positions[k]), float(peaks[k])) for k in found]
    return sorted(features, key=lambda feature: -feature.positions)


def _inspect_text(
    model: str, path: Path, threshold: float, layer: str, tokens: int, revision: str | None, token: str | None
) -> ActivationReport:
    from quantize8.model.loading import load, quiet

    content = read_text(path)
    loaded, tokenizer = load(model, "cpu", revision=revision, token=token)
    if tokenizer is None:
        raise SourceError(f"{model}: has no tokenizer, so no text can be given to it")
    if loaded.config.is_encoder_decoder:
        raise SourceError(f"{model}: is an encoder-decoder, which is not inspected with a text; leave --text out")
    limit = min(tokens, getattr(loaded.config, "max_position_embeddings", None) or tokens)
    with quiet():
        ids = tokenizer(content, return_tensors="pt", truncation=True, max_length=limit)["input_ids"][0]
    report = activations(loaded, ids, threshold, layer)
    _matching([entry.module for entry in report.linears], layer, model)
    return report


def _linear_modules(checkpoint: Checkpoint) -> dict[str, bool]:
    """Linear weights, of a quantized checkpoint the quantized ones -> whether they are stored [in, out]."""
    if checkpoint.decoded:
        return {name.removesuffix(".weight"): False for name in checkpoint.tensors if name in checkpoint.decoded}
    structure = read_structure(checkpoint.config, checkpoint.tensors)
    modules = structure.linears | dict.fromkeys([*structure.kept, *structure.experts], "")
    return {name: kind == CONV1D for name, kind in modules.items() if _quantizable(checkpoint, name)}


def _quantizable(checkpoint: Checkpoint, module: str) -> bool:
    info = checkpoint.tensors.get(f"{module}.weight")
    return info is not None and info.dtype in QUANTIZABLE and len(info.shape) == 2


def _known_errors(folder: Path) -> dict[str, float]:
    if not (folder / MANIFEST_NAME).is_file():
        return {}
    records = read_manifest(folder).tensors.items()
    return {name.rpartition(".")[0]: entry.quantized.relative_error for name, entry in records if entry.quantized}


def _matching(names: list[str], pattern: str, model: str) -> list[str]:
    chosen = [name for name in names if fnmatchcase(name, pattern)]
    if not chosen:
        raise SourceError(f"{model}: no Linear layer is called {pattern!r}; leave --layer out to see all names")
    return chosen


def _weight_report(checkpoint: Checkpoint, module: str, transposed: bool, error: float | None) -> WeightReport:
    info = checkpoint.tensors[f"{module}.weight"]
    rows, columns = info.shape[::-1] if transposed else info.shape
    stats, absmax = ColumnStats.empty(columns), []
    size = info.nbytes if transposed else None
    for block in checkpoint.blocks(info.name, size, multiple=STATS_TILE_ROWS):
        absmax.append(cpu.quantize_rowwise(np.ascontiguousarray(block.T) if transposed else block, stats)[1])
    peaks = np.concatenate(absmax) if absmax else np.zeros(0, np.float32)
    dtype = checkpoint.stored_dtype(info.name)
    found = summarize(stats, peaks, dtype, "", transposed)
    return WeightReport(
        module,
        dtype,
        (rows, columns),
        float(stats.absmax.max(initial=0)),
        math.sqrt(float(stats.sum_square.sum()) / max(1, rows * columns)),
        found.outliers,
        error if checkpoint.is_int8(info.name) else found.relative_error,
        found.worst_columns,
    )


@dataclass
class _NormOutput:
    values: Tensor  # held, so that no later tensor takes its place in memory
    counted: bool = False


class _Recorder:
    """Hooks on a model that note the outliers of each Linear's input during one forward pass."""

    def __init__(self, model: Any, threshold: float) -> None:
        self.linears: list[LinearReport] = []
        self.inputs: list[tuple[Array, Array]] = []  # of layer inputs: share of positions and largest |x|, by column
        self._model, self._threshold = model, threshold
        self._norms: deque[_NormOutput] = deque(maxlen=_RECENT_NORMS)

    def __enter__(self) -> None:
        from torch import nn
        from transformers.pytorch_utils import Conv1D

        head = self._model.get_output_embeddings()
        self._hooks = []
        for name, module in self._model.named_modules():
            if isinstance(module, nn.Linear | Conv1D):
                note = self._noter(name, counts=module is not head)
                self._hooks.append(module.register_forward_pre_hook(note))
            elif "norm" in type(module).__name__.lower():
                self._hooks.append(module.register_forward_hook(self._note_norm))

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def _note_norm(self, _module: Any, _inputs: Any, output: Any) -> None:
        if hasattr(output, "data_ptr"):  # a tensor: some norms return a residual beside it, and are not recognized
            self._norms.append(_NormOutput(output))

    def _noter(self, name: str, counts: bool) -> Any:
        def note(_module: Any, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0].detach().reshape(-1, inputs[0].shape[-1]).float().abs()
            over = x >= self._threshold
            peaks = x.amax(0)
            columns = over.any(0).nonzero().flatten().tolist()
            positions = float(over.any(1).float().mean())
            column = int(peaks.argmax())
            self.linears.append(LinearReport(name, x.shape[1], float(peaks[column]), column, columns, positions))
            if counts and self._is_new_layer_input(inputs[0]):
                self.inputs.append((over.float().mean(0).numpy(), peaks.numpy()))

        return note

    def _is_new_layer_input(self, x: Tensor) -> bool:
        """Whether x is the output of a norm that no Linear has read before (q, k and v read the same one)."""
        for norm in self._norms:
            if norm.values.data_ptr() == x.data_ptr() and norm.values.shape == x.shape:
                new, norm.counted = not norm.counted, True
                return new
        return False
