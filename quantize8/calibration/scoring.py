"""Scores of loaded models on token ids: the likelihood of each token, and the divergence of two models' predictions.

A text is cut into windows that do not overlap. In each window all tokens but the first are scored, from the logits
[V] over the vocabulary at the preceding token. All figures of a token are computed from a log-softmax in float32.

Memory in addition to the models: for each model the logits of one window, [context, V] in the model's dtype; copies of
`_CHUNK` logits, 85 MB in all; and with `layers` the hidden states of one window, [layers, context, K], for each model.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from quantize8.errors import SourceError
from quantize8.kernels.reference import Array

if TYPE_CHECKING:
    from torch import Tensor

_CHUNK = 1 << 22  # logits that are processed at a time: 16 MB in float32, 27 tokens with a vocabulary of 150,000


@dataclass(frozen=True)
class Pairs:
    """Scores of a model and its reference. Arrays [S] have one entry per scored token, in the order of the text."""

    positions: Array  # int64: number of tokens of the window that come before the token
    nll: Array  # float64: negative log-likelihood by the model, in nats
    reference_nll: Array  # float64: the same by the reference
    kl: Array  # float64: KL(reference || model) over the whole vocabulary, in nats
    same_top1: Array  # bool: whether the most likely token is the same in both models
    layers: dict[str, float]  # if requested: ||h - h_ref||_F / ||h_ref||_F of each decoder layer, by module name


def likelihoods(model: Any, ids: Tensor, context: int) -> Array:
    """The negative log-likelihood of each scored token of a text.

    Args:
        model: A causal language model of transformers.
        ids: Token ids int64 [T].
        context: Number of tokens in a window.

    Returns:
        float64 [S], in nats.

    Raises:
        SourceError: There are fewer than two tokens, the context is below two, or logits are not finite.
    """
    chunks = []
    for window in _windows(ids, context):
        logits, _ = _forward(model, window, 1, layers=False)
        targets = window[1:].to(logits.device)
        chunks += [_nll(logits[rows].float().log_softmax(-1), targets[rows], "model") for rows in _chunks(logits)]
    return np.concatenate(chunks)


def compare(model: Any, reference: Any, ids: Tensor, context: int, layers: bool = False) -> Pairs:
    """Score a text by a model and its reference, window by window, so that only one window's logits are in memory.

    Args:
        model: A causal language model of transformers.
        reference: The model to compare it with.
        ids: Token ids int64 [T].
        context: Number of tokens in a window.
        layers: Also compute the error of the hidden states after each decoder layer, over all tokens of the text. The
            states are transformers' `hidden_states`: those of the last layer are taken after the final norm.

    Raises:
        SourceError: As in `likelihoods`; or the vocabularies or, with `layers`, the hidden states of the two models
            have different sizes; or the model gives a token the probability 0 and the reference does not.
    """
    scored = [_compare_window(model, reference, window, 1, layers) for window in _windows(ids, context)]
    windows = [pairs for pairs, _ in scored]
    errors = [_ratio(*row) for row in np.sum([squares for _, squares in scored], axis=0)]
    return Pairs(
        np.concatenate([pairs.positions for pairs in windows]),
        np.concatenate([pairs.nll for pairs in windows]),
        np.concatenate([pairs.reference_nll for pairs in windows]),
        np.concatenate([pairs.kl for pairs in windows]),
        np.concatenate([pairs.same_top1 for pairs in windows]),
        dict(zip(_layer_names(model, len(errors)), errors, strict=True)),
    )


def compare_continuation(model: Any, reference: Any, ids: Tensor, first: int) -> Pairs:
    """Score a continuation by a model and its reference, with teacher forcing in one pass of each.

    Only the logits of the scored tokens are computed if the architecture allows it.

    Args:
        model: A causal language model of transformers.
        reference: The model to compare it with.
        ids: Token ids int64 [T], prompt and continuation.
        first: Index of the first token to score, at least 1.

    Raises:
        SourceError: As in `compare`.
    """
    return _compare_window(model, reference, ids, first, layers=False)[0]


def check_context(context: int) -> None:
    """Raise SourceError if windows of this many tokens have no token that is scored."""
    if context < 2:
        raise SourceError(f"context {context}: must be 2 or more, as the first token of a window is not scored")


def _windows(ids: Tensor, context: int) -> Iterator[Tensor]:
    """The windows of a text, with at least two tokens each; a single token at the end is left out."""
    check_context(context)
    if len(ids) < 2:
        raise SourceError("text: has fewer than two tokens; use a longer text")
    for start in range(0, len(ids) - 1, context):
        yield ids[start : start + context]


def _compare_window(model: Any, reference: Any, window: Tensor, first: int, layers: bool) -> tuple[Pairs, Array]:
    """Scores of window[first:], and with `layers` squared norms of hidden states, [layers, 2]: error, reference."""
    ours, our_states = _forward(model, window, first, layers)
    theirs, their_states = _forward(reference, window, first, layers)
    if ours.shape != theirs.shape:
        widths = f"{ours.shape[-1]} tokens, the reference's {theirs.shape[-1]}"
        raise SourceError(f"the model's vocabulary has {widths}; compare models with the same vocabulary")
    squares = _squared_norms(our_states, their_states)
    del our_states, their_states
    targets = window[first:].to(ours.device)
    chunks = [_compare_chunk(ours[rows], theirs[rows], targets[rows]) for rows in _chunks(ours)]
    nll, reference_nll, kl, same = (np.concatenate(column) for column in zip(*chunks, strict=True))
    return Pairs(np.arange(first, len(window)), nll, reference_nll, kl, same, {}), squares


def _compare_chunk(ours: Tensor, theirs: Tensor, targets: Tensor) -> tuple[Array, Array, Array, Array]:
    """Scores for logits [m, V] and target ids [m]: nll, the reference's nll, KL in float64, and top-1 agreement."""
    import torch

    theirs = theirs.to(ours.device)
    same = ours.argmax(-1) == theirs.argmax(-1)
    log_q, log_p = ours.float().log_softmax(-1), theirs.float().log_softmax(-1)
    nll, reference_nll = _nll(log_q, targets, "model"), _nll(log_p, targets, "reference")
    impossible = log_p == -math.inf  # masked tokens contribute p log p = 0, but -inf - -inf would give NaN
    terms = (log_p - log_q).mul_(log_p.exp_()).masked_fill_(impossible, 0)
    kl = terms.sum(-1, dtype=torch.float64).cpu().numpy()
    if not np.isfinite(kl).all():
        raise SourceError(
            "the model gives a token the probability 0 that the reference does not, so KL is infinite; compare models "
            "that exclude the same tokens"
        )
    return nll, reference_nll, kl, same.cpu().numpy()


def _nll(log: Tensor, targets: Tensor, which: str) -> Array:
    """Negative log-likelihoods float64 [m] of `targets` [m] for log-probabilities [m, V]."""
    nll: Array = -log.gather(1, targets[:, None])[:, 0].double().cpu().numpy()
    if not np.isfinite(nll).all():  # one NaN logit makes its whole row NaN
        raise SourceError(f"the {which} gives logits that are NaN or infinite; check its weights, or try a wider dtype")
    return nll


def _forward(model: Any, window: Tensor, first: int, layers: bool) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Logits [len(window) - first, V] at the token before each scored one; with `layers`, hidden states [1, T, K]."""
    import torch

    keep = len(window) - first + 1  # includes the logits of the last token, which predict no token of the window
    options: dict[str, Any] = {"output_hidden_states": True} if layers else {}
    if first > 1 and "logits_to_keep" in inspect.signature(model.forward).parameters:
        options["logits_to_keep"] = keep
    with torch.inference_mode():
        output = model(window[None].to(model.device), **options)
    return output.logits[0, -keep:-1], output.hidden_states[1:] if layers else ()


def _chunks(logits: Tensor) -> Iterator[slice]:
    """Slices of the rows of logits [m, V] with at most `_CHUNK` logits each."""
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
    """||error|| / ||reference|| from their squares; 0 if both are 0."""
    if reference == 0:
        return 0.0 if error == 0 else math.inf
    return math.sqrt(error / reference)


def _layer_names(model: Any, count: int) -> list[str]:
    """Module names of the decoder layers: those of the first module list that has `count` modules."""
    from torch import nn

    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return [f"{name}.{i}" for i in range(count)]
    return [str(i) for i in range(count)]
