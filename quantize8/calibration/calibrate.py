"""Calibration: a text runs through a model once, and the outlier columns of each layer's weight are chosen from it."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn

from quantize8.artifact.outliers import Calibrated
from quantize8.calibration.activations import dense_weight, watch
from quantize8.calibration.columns import choose_columns
from quantize8.calibration.expected import weight_error
from quantize8.calibration.text import streamed_with_text
from quantize8.errors import SourceError
from quantize8.sources import Checkpoint
from quantize8.sources.structure import structure_of

DEFAULT_TOKENS = 1024  # of the text; every model with a context of at least 1024 can take them at once


def calibrate(
    checkpoint: Checkpoint,
    text: str,
    columns: int | None = None,
    tokens: int = DEFAULT_TOKENS,
    *,
    modules: Collection[str] | None = None,
) -> dict[str, Calibrated]:
    """Choose the outlier columns of Linear layers from the activations of a text.

    The model runs once, layer by layer, in float32 on the CPU. Experts that transformers joins into one tensor are not
    calibrated.

    Args:
        checkpoint: The model.
        text: The calibration text.
        columns: Number of outlier columns of each weight, all stored exactly in weight and activation; None to choose
            as many as are worth it.
        tokens: Number of tokens of the text to use, from its start.
        modules: Names of the modules to calibrate, as the checkpoint names them; None for all Linear layers.

    Returns:
        Outlier columns and activation statistics by module, as the checkpoint names it.

    Raises:
        SourceError: The model cannot run, has no tokenizer, or computes NaN or infinity.
    """
    structure = structure_of(checkpoint)
    stored = {model: name for name, model in structure.model_names.items()}
    calibrated: dict[str, Calibrated] = {}

    def note(name: str, module: nn.Module, x: Tensor, y: Tensor | None) -> None:
        in_checkpoint = stored.get(name, name)
        if modules is not None and in_checkpoint not in modules:
            return
        if not x.isfinite().all():
            raise SourceError(
                f"{checkpoint.name}: the text makes the input of {name} NaN or infinite; use another text"
            )
        calibrated[in_checkpoint] = _calibrated(x, dense_weight(module), columns)

    with streamed_with_text(checkpoint, text, tokens) as (model, ids), watch(model, note), torch.no_grad():
        model(ids[None])
    return calibrated


def _calibrated(x: Tensor, weight: Tensor, most: int | None) -> Calibrated:
    columns, exact = choose_columns(x, weight_error(weight), most)
    mean_square, absmax = x.square().mean(0), x.abs().amax(0)
    arrays: list[Any] = [columns.int().numpy(), mean_square.numpy(), absmax.numpy()]
    return Calibrated(arrays[0], exact, *arrays[1:])
