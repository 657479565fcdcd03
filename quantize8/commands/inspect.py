"""Outlier statistics of the weights of a checkpoint or artifact, or of its activations on a text.

With a text, the model is streamed: memory holds the weights of one decoder layer and the activations of the text.
"""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path

import numpy as np

from quantize8.artifact.manifest import MANIFEST_NAME, read_manifest, summarize
from quantize8.calibration.advice import DEFAULT_BUDGET, best_command, recommend
from quantize8.calibration.outliers import ActivationReport
from quantize8.calibration.text import read_text
from quantize8.errors import SourceError
from quantize8.kernels import cpu
from quantize8.kernels.reference import DEFAULT_THRESHOLD, STATS_TILE_ROWS, ColumnStats
from quantize8.optional import require
from quantize8.sources import Checkpoint, open_checkpoint
from quantize8.sources.base import QUANTIZABLE, READERS
from quantize8.sources.structure import CONV1D, structure_of, with_separate_experts

DEFAULT_TOKENS = 1024


@dataclass(frozen=True)
class WeightReport:
    """Statistics of one Linear weight."""

    module: str
    dtype: str  # as stored: F16, BF16, F32, I8 and others
    shape: tuple[int, int]  # [N, K]
    absmax: float
    rms: float
    outliers: int  # weights beyond 6 standard deviations of their row
    relative_error: float | None  # of int8: computed now for a checkpoint, from the manifest for an artifact
    worst_columns: list[tuple[int, int, float]]  # (input column, number of its outliers, its largest |w|)


def inspect(
    model: str,
    *,
    text: str | Path | None = None,
    threshold: float = DEFAULT_THRESHOLD,
    layer: str = "*",
    tokens: int = DEFAULT_TOKENS,
    budget: float = DEFAULT_BUDGET,
    revision: str | None = None,
    token: str | None = None,
) -> list[WeightReport] | ActivationReport:
    """Report outlier statistics of the weights of a model, or of its activations on a text.

    Args:
        model: A checkpoint or artifact: a folder, a file or a hub id.
        text: A text file in UTF-8, whose activations are reported. None reports the weights.
        threshold: Magnitude from which an activation is an outlier: |x| >= threshold. Used with `text`.
        layer: Glob pattern of the module names to report.
        tokens: Number of tokens to use, from the start of the text; limited to the positions that the model has.
        budget: Largest mean relative error of the int8 layer outputs that the recommended threshold may have.
        revision: Branch, tag or commit of a hub model.
        token: Hub token. None uses the one that `hf auth login` stored.

    Returns:
        A `WeightReport` for each Linear layer, or with `text` one `ActivationReport`.

    Raises:
        SourceError: The model or the text cannot be read, no module matches `layer`, or a number is out of range.
        DependencyError: A text is given, and torch or transformers is missing.
    """
    if not threshold > 0:
        raise SourceError(f"threshold {threshold:g}: must be positive, because an outlier is a value that reaches it")
    if not budget > 0:
        raise SourceError(f"budget {budget:g}: must be positive, because int8 always has an error")
    if text is not None:
        require("to inspect activations")
    content = None if text is None else read_text(Path(text))
    checkpoint = open_checkpoint(model, revision=revision, token=token)
    if content is not None:
        report = _inspect_text(checkpoint, model, content, threshold, layer, tokens)
        if report.thresholds:
            command = best_command(report, model, str(text))
            report.advice = replace(recommend(report, budget), command=command)
        return report
    errors = _known_errors(checkpoint.folder) if checkpoint.decoded else {}
    checkpoint, modules = _linear_modules(checkpoint)
    chosen = _matching(list(modules), layer, model)
    with ThreadPoolExecutor(READERS) as pool:
        return list(pool.map(lambda name: _weight_report(checkpoint, name, modules[name], errors.get(name)), chosen))


def _inspect_text(
    checkpoint: Checkpoint, model: str, text: str, threshold: float, layer: str, tokens: int
) -> ActivationReport:
    from quantize8.calibration.activations import activations, linear_layers
    from quantize8.calibration.text import streamed_with_text

    with streamed_with_text(checkpoint, text, tokens) as (loaded, ids):
        _matching([name for name, _ in linear_layers(loaded)], layer, model)
        return activations(loaded, ids, threshold, layer)


def _linear_modules(checkpoint: Checkpoint) -> tuple[Checkpoint, dict[str, bool]]:
    """Find what can be inspected.

    Returns:
        The checkpoint, with one matrix for each expert, and its Linear modules (of a quantized checkpoint, the
        quantized ones) -> whether the weight is stored as [in, out].
    """
    decoded = [info for info in checkpoint.tensors.values() if info.name in checkpoint.decoded]
    if decoded and all(len(info.shape) == 2 for info in decoded):
        return checkpoint, {info.name.removesuffix(".weight"): False for info in decoded}
    checkpoint, structure = with_separate_experts(checkpoint, structure_of(checkpoint))
    modules = structure.linears | dict.fromkeys([*structure.kept, *structure.experts], "")
    return checkpoint, {name: kind == CONV1D for name, kind in modules.items() if _quantizable(checkpoint, name)}


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
        raise SourceError(f"{model}: no Linear layer matches {pattern!r}; leave out --layer to list all names")
    return chosen


def _weight_report(checkpoint: Checkpoint, module: str, transposed: bool, error: float | None) -> WeightReport:
    info = checkpoint.tensors[f"{module}.weight"]
    rows, columns = info.shape[::-1] if transposed else info.shape
    stats, absmax = ColumnStats.empty(columns), []
    size = info.nbytes if transposed else None
    for block in checkpoint.blocks(info.name, size, multiple=STATS_TILE_ROWS):
        absmax.append(cpu.quantize_rowwise(np.ascontiguousarray(block.T) if transposed else block, stats)[1])
    peaks = np.concatenate(absmax) if absmax else np.zeros(0, np.float32)
    dtype = info.stored_dtype
    found = summarize(stats, peaks, dtype, "", transposed)
    return WeightReport(
        module,
        dtype,
        (rows, columns),
        float(stats.absmax.max(initial=0)),
        math.sqrt(float(stats.sum_square.sum()) / max(1, rows * columns)),
        found.outliers,
        error if info.is_int8 or error is not None else found.relative_error,
        found.worst_columns,
    )
