"""How loaded models predict token ids: each token's likelihood, and how far two models' predictions are apart.

A text is cut into windows that do not overlap. Of each window all tokens but the first are scored, from the logits
[V] over the vocabulary at the token before. All figures of a token are taken from a log-softmax in float32.

Memory, beside the models: the logits of one window, [context, V] in the model's dtype, of each model; copies of
`_CHUNK` logits, 85 MB in all; with `layers` the hidden states of one window, [layers, context, K], of each model.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from quantize8.errors import SourceError
from quantize8.ops.reference import Array

if TYPE_CHECKING:
    from torch import Tensor

_CHUNK = 1 << 22  # logits at a time: 16 MB in float32, 27 tokens of a vocabulary of 150,000


@dataclass(frozen=True)
class Pairs:
    """A model beside its reference; arrays have one entry a scored token [S], in the order of the text."""

    positions: Array  # int64: how many tokens of the window come before it
    nll: Array  # float64: negative log-likelihood by the model, nats
    reference_nll: Array  # float64: the same by the reference
    kl: Array  # float64: KL(reference || model) over the whole vocabulary, nats
    same_top1: Array  # bool: whether both find the same token the likeliest
    layers: dict[str, float]  # where asked: each decoder layer's ||h - h_ref||_F / ||h_ref||_F, by module name


def likelihoods(model: Any, ids: Tensor, context: int) -> Array:
    """Negative log-likelihoods in nats, float64 [S], of token ids [T] in windows of `context` tokens.

    Raises SourceError for fewer than two tokens or a context below two, and for logits that are not finite.
    """
    parts = []
    for window in _windows(ids, context):
        logits, _ = _forward(model, window, 1, layers=False)
        targets = window[1:].to(logits.device)
        parts += [_nll(logits[rows].float().log_softmax(-1), targets[rows], "model") for rows in _chunks(logits)]
    return np.concatenate(parts)


def compare(model: Any, reference: Any, ids: Tensor, context: int, layers: bool = False) -> Pairs:
    """Score token ids [T] by both models, window by window, so that the logits of one window are held at a time.

    The hidden states of `layers` are what transformers names so: the last layer's come after the final norm. Their
    error is taken over all tokens of the text. Raises SourceError as `likelihoods` does, and where the models'
    vocabularies or, with `layers`, hidden states have different sizes.
    """
    scored = [_compare_window(model, reference, window, 1, layers) for window in _windows(ids, context)]
    parts = [part for part, _ in scored]
    errors = [_ratio(*row) for row in np.sum([squares for _, squares in scored], axis=0)]
    return Pairs(
        np.concatenate([part.positions for part in parts]),
        np.concatenate([part.nll for part in parts]),
        np.concatenate([part.reference_nll for part in parts]),
        np.concatenate([part.kl for part in parts]),
        np.concatenate([part.same_top1 for part in parts]),
        dict(zip(_layer_names(model, len(errors)), errors, strict=True)),
    )


def compare_continuation(model: Any, reference: Any, ids: Tensor, first: int) -> Pairs:
    """Score the tokens ids[first:] by both models, given all before them: teacher forcing in one pass of each.

    ids [T], first at least 1. Only the logits of the scored tokens are computed where the architecture allows it.
    """
    return _compare_window(model, reference, ids, first, layers=False)[0]


def check_context(context: int) -> None:
    """Raise SourceError for windows in which no token is scored."""
    if context < 2:
        raise SourceError(f"context {context}: must be 2 or more, for the first token of a window is not scored")


def _windows(ids: Tensor, context: int) -> Iterator[Tensor]:
    """Windows of at least two tokens; a last token alone is left out."""
    check_context(context)
    if len(ids) < 2:
        raise SourceError("text: holds fewer than two tokens; give a longer one")
    for start in range(0, len(ids) - 1, context):
        yield ids[start : start + context]


def _compare_window(model: Any, reference: Any, window: Tensor, first: int, layers: bool) -> tuple[Pairs, Array]:
    """Scores of window[first:], and with `layers` the squared norms of hidden states: [layers, (error, reference)]."""
    ours, our_states = _forward(model, window, first, layers)
    theirs, their_states = _forward(reference, window, first, layers)
    if ours.shape != theirs.shape:
        widths = f"{ours.shape[-1]} tokens, the reference's {theirs.shape[-1]}"
        raise SourceError(f"the model's vocabulary has {widths}; compare models of the same vocabulary")
    squares = _squared_norms(our_states, their_states)
    del our_states, their_states
    targets = window[first:].to(ours.device)
    chunks = [_compare_chunk(ours[rows], theirs[rows], targets[rows]) for rows in _chunks(ours)]
    nll, reference_nll, kl, same = (np.concatenate(column) for column in zip(*chunks, strict=True))
    return Pairs(np.arange(first, len(window)), nll, reference_nll, kl, same, {}), squares


def _compare_chunk(ours: Tensor, theirs: Tensor, targets: Tensor) -> tuple[Array, Array, Array, Array]:
    """Of logits [m, V] and target ids [m]: nll, the reference's, KL in float64, and whether the top-1 are the same."""
    import torch

    theirs = theirs.to(ours.device)
    same = ours.argmax(-1) == theirs.argmax(-1)
    log_q, log_p = ours.float().log_softmax(-1), theirs.float().log_softmax(-1)
    nll, reference_nll = _nll(log_q, targets, "model"), _nll(log_p, targets, "reference")
    impossible = log_p == -math.inf  # masked tokens add p log p = 0, which -inf - -inf would make NaN
    terms = (log_p - log_q).mul_(log_p.exp_()).masked_fill_(impossible, 0)
    kl = terms.sum(-1, dtype=torch.float64).cpu().numpy()
    if not np.isfinite(kl).all():
        raise SourceError("the model gives a token the probability 0 that the reference does not, so KL is infinite")
    return nll, reference_nll, kl, same.cpu().numpy()


def _nll(log: Tensor, targets: Tensor, which: str) -> Array:
    """Negative log-likelihoods of `targets` [m] under log-probabilities [m, V]; a NaN logit makes its row NaN."""
    nll: Array = -log.gather(1, targets[:, None])[:, 0].double().cpu().numpy()
    if not np.isfinite(nll).all():
        raise SourceError(f"the {which} gives logits that are NaN or infinite; check its weights, or try a wider dtype")
    return nll


def _forward(model: Any, window: Tensor, first: int, layers: bool) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Logits [len(window) - first, V] at the token before each scored one; with `layers`, [1, T, K] after each."""
    import torch

    keep = len(window) - first + 1  # that of the last token, too: it predicts nothing here, but the model reads it
    options: dict[str, Any] = {"output_hidden_states": True} if layers else {}
    if first > 1 and "logits_to_keep" in inspect.signature(model.forward).parameters:
        options["logits_to_keep"] = keep
    with torch.inference_mode():
        output = model(window[None].to(model.device), **options)
    return output.logits[0, -keep:-1], output.hidden_states[1:] if layers else ()


def _chunks(logits: Tensor) -> Iterator[slice]:
    """Rows of logits [m, V], so many that `_CHUNK` is not exceeded."""
    count = max(1, _CHUNK // logits.shape[1])
    return (slice(start, start + count) for start in range(0, len(logits), count))


def _squared_norms(ours: tuple[Tensor, ...], theirs: tuple[Tensor, ...]) -> Array:
    if [state.shape for state in ours] != [state.shape for state in theirs]:
        raise SourceError("layers: the two models have hidden states of different sizes; leave --layers out")
    rows = []
    for state, expected in zip(ours, theirs, strict=True):
        right = expected.to(state.device).double()
        rows.append([float((state.double() - right).square().sum()), float(right.square().sum())])
    return np.array(rows, np.float64).reshape(-1, 2)


def _ratio(error: float, reference: float) -> float:
    """||error|| / ||reference|| from their squares; 0 where both are 0."""
    if reference == 0:
        return 0.0 if error == 0 else math.inf
    return math.sqrt(error / reference)


def _layer_names(model: Any, count: int) -> list[str]:
    """Module names of the decoder layers: the outermost list of `count` modules."""
    from torch import nn

    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return [f"{name}.{i}" for i in range(count)]
    return [str(i) for i in range(count)]
