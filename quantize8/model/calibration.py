"""Calibration: a text is put through a model once, and of each layer's weight the outlier columns are chosen."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn

from quantize8.artifact.outliers import Calibrated
from quantize8.checkpoint import Checkpoint
from quantize8.checkpoint.structure import structure_of
from quantize8.errors import SourceError
from quantize8.model.activations import dense_weight, watch
from quantize8.model.columns import choose_columns
from quantize8.model.expected import weight_error
from quantize8.model.text import streamed_with_text

DEFAULT_TOKENS = 1024  # of the text; as many as a model with a context of 1024 sees at once


def calibrate(
    checkpoint: Checkpoint,
    text: str,
    columns: int | None = None,
    tokens: int = DEFAULT_TOKENS,
    *,
    modules: Collection[str] | None = None,
) -> dict[str, Calibrated]:
    """Outlier columns by module, as the checkpoint names it: of all Linear layers, or of those in `modules`.

    The model runs once over the first `tokens` tokens, layer by layer, in float32 on the CPU. `columns` of each weight
    are kept, exactly in weight and activation; None: as many as are worth it. Experts that transformers joins are not
    calibrated. Raises SourceError where the model cannot run, has no tokenizer, or computes NaN or infinity.
    """
    structure = structure_of(checkpoint)
    stored = {model: name for name, model in structure.model_names.items()}
    found: dict[str, Calibrated] = {}

    def note(name: str, module: nn.Module, x: Tensor, y: Tensor | None) -> None:
        in_checkpoint = stored.get(name, name)
        if modules is not None and in_checkpoint not in modules:
            return
        if not x.isfinite().all():
            raise SourceError(
                f"{checkpoint.name}: the text makes the input of {name} NaN or infinite; take another one"
            )
        found[in_checkpoint] = _calibrated(x, dense_weight(module), columns)

    with streamed_with_text(checkpoint, text, tokens) as (model, ids), watch(model, note), torch.no_grad():
        model(ids[None])
    return found


def _calibrated(x: Tensor, weight: Tensor, most: int | None) -> Calibrated:
    columns, exact = choose_columns(x, weight_error(weight), most)
    mean_square, absmax = x.square().mean(0), x.abs().amax(0)
    arrays: list[Any] = [columns.int().numpy(), mean_square.numpy(), absmax.numpy()]
    return Calibrated(arrays[0], exact, *arrays[1:])
