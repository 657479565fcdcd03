"""How well a model predicts a text, and how near its predictions are to those of the model it was made from.

Perplexity is exp of the mean negative log-likelihood (natural log) of the scored tokens; KL divergence is from the
reference to the model, over the whole vocabulary, in nats a token. `quantize8.model.scoring` says what is scored.

Intervals are of 95%, by batch means. Neighbouring tokens are alike in how hard they are, so the plain standard error,
which takes them as independent, is too small. The S scored tokens, in the order of the text, are cut into blocks of
sqrt(S) tokens; long blocks are nearly independent of each other. The standard error of the mean is the standard
deviation of the B block means / sqrt(B) (Flegal and Jones 2010, doi:10.1214/09-AOS735, for batches of sqrt(S)), and the
interval is mean +- t * error, with Student's t for B - 1 degrees of freedom. Windows would be the natural blocks, but
a text has too few of them. Perplexities and their ratio take exp of both ends; the ratio's interval is that of the
differences token by token, so what both models find hard cancels out. An interval speaks of text like this one.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from quantize8.errors import SourceError
from quantize8.model.loading import quiet
from quantize8.model.scoring import Pairs, check_context, compare, likelihoods
from quantize8.model.text import open_for_text, read_text
from quantize8.ops.reference import Array, OutlierMode
from quantize8.resources import TEXT

if TYPE_CHECKING:
    from torch import Tensor

DEFAULT_CONTEXT = 1024  # tokens; long enough that the first tokens of a window do not dominate
DEFAULT_TOKENS = 4096  # four such windows, and less than the shipped text has
_BUCKETS = 64  # of positions in a window: enough for a plot
_CONFIDENCE = 0.95
_FEWEST = 100  # scored tokens for an interval: 10 blocks of 10


@dataclass(frozen=True)
class Perplexity:
    """exp of the mean negative log-likelihood (natural log) of the scored tokens."""

    perplexity: float
    scored: int  # tokens; the first of each window has nothing before it, and is not scored


@dataclass(frozen=True)
class Estimate:
    """A figure with its 95% confidence interval."""

    value: float
    low: float | None  # None where fewer than 100 tokens were scored
    high: float | None


@dataclass(frozen=True)
class Positions:
    """Mean KL divergence over neighbouring positions in the window."""

    first: int  # tokens of the window before the first of them
    tokens: int  # scored there, over all windows
    kl: float  # nats a token


@dataclass(frozen=True)
class Divergence:
    """KL(reference || model) a token, in nats."""

    mean: float
    standard_error: float | None  # of the mean; None where fewer than 100 tokens were scored
    median: float
    p99: float  # 99th percentile
    max: float
    by_position: list[Positions]


@dataclass(frozen=True)
class Agreement:
    """How near a model's predictions are to its reference's, on the same tokens."""

    reference: str
    perplexity: Estimate  # the reference's
    ratio: Estimate  # the model's perplexity / the reference's, from differences token by token
    kl: Divergence
    top1: float  # share of tokens at which both find the same token the likeliest
    layers: dict[str, float]  # decoder layer -> ||h - h_ref||_F / ||h_ref||_F of the hidden states after it


@dataclass(frozen=True)
class Evaluation:
    """How well a model predicts a text."""

    model: str
    tokens: int  # of the text
    scored: int  # all but the first of each window
    context: int  # tokens of a window
    perplexity: Estimate
    agreement: Agreement | None = field(default=None)  # with a reference


def evaluate(
    model: str,
    *,
    text: str | Path | None = None,
    reference: str | None = None,
    context: int = DEFAULT_CONTEXT,
    tokens: int = DEFAULT_TOKENS,
    layers: bool = False,
    device: str = "auto",
    mode: OutlierMode | None = None,
    threshold: float | None = None,
    revision: str | None = None,
    token: str | None = None,
) -> Evaluation:
    """Perplexity of a model on a text; with `reference` also KL divergence and top-1 agreement.

    Both models are in memory at once, and of their logits those of one window.

    Args: model and reference, folders, GGUF files or hub ids; text, a file in UTF-8 (default: the beginning of an
    address that ships with the package); context, tokens of a window, at most what both models take
    (max_position_embeddings); tokens, the first so many are used; layers, compare hidden states, too; device, auto, cpu
    or cuda; mode, threshold and revision, of `model` only: the reference runs as it is.
    Raises: SourceError where a model or the text cannot be read, the text has fewer than two tokens, the models do not
    share tokenizer and vocabulary, or logits are not finite.
    """
    _check(context, tokens, threshold, layers and reference is None)
    content = read_text(TEXT if text is None else Path(text))
    loaded, tokenizer = _open(model, device, mode, revision, token, threshold)
    ids = _encode(tokenizer, content, tokens)
    if reference is None:
        context = _limit(context, loaded)
        nll = likelihoods(loaded, ids, context)
        return Evaluation(model, len(ids), len(nll), context, _perplexity(nll), None)
    other, its_tokenizer = _open(reference, device, token=token)
    if not _encode(its_tokenizer, content, tokens).equal(ids):
        raise SourceError(f"{reference}: its tokenizer splits the text otherwise; take a reference with the same one")
    context = _limit(context, loaded, other)
    pairs = compare(loaded, other, ids, context, layers)
    agreement = _agreement(reference, pairs)
    return Evaluation(model, len(ids), len(pairs.nll), context, _perplexity(pairs.nll), agreement)


def perplexity(model: Any, ids: Tensor, context: int = DEFAULT_CONTEXT) -> Perplexity:
    """Perplexity of a loaded causal model on token ids [T], in windows of `context` tokens that do not overlap.

    Raises SourceError where there are fewer than two tokens, or logits are not finite.
    """
    nll = likelihoods(model, ids, context)
    return Perplexity(_exp(float(nll.mean())), len(nll))


def standard_error(values: Array) -> tuple[float, int] | None:
    """Standard error of the mean of correlated values [S] in their order, by batch means, and its degrees of freedom.

    None for fewer than 100 values.
    """
    if len(values) < _FEWEST:
        return None
    blocks = np.array_split(values, len(values) // math.isqrt(len(values)))
    means = [float(block.mean()) for block in blocks]
    return statistics.stdev(means) / math.sqrt(len(means)), len(means) - 1


def interval(values: Array) -> Estimate:
    """The mean of correlated values [S] in their order, with its 95% interval."""
    mean, found = float(values.mean()), standard_error(values)
    if found is None:
        return Estimate(mean, None, None)
    error, freedom = found
    reach = _student(freedom) * error
    return Estimate(mean, mean - reach, mean + reach)


def _check(context: int, tokens: int, threshold: float | None, layers_alone: bool) -> None:
    check_context(context)
    if tokens < 2:
        raise SourceError(f"tokens {tokens}: must be 2 or more, for the first token is not scored")
    if threshold is not None and not 0 <= threshold < math.inf:
        raise SourceError(f"threshold {threshold:g}: must be 0 (off) or a positive number")
    if layers_alone:
        raise SourceError("layers: hidden states are compared with a reference's; add --reference")


def _open(model: str, device: str, *options: Any, **more: Any) -> tuple[Any, Any]:
    loaded, tokenizer = open_for_text(model, device, *options, **more)
    if loaded.config.is_encoder_decoder:
        raise SourceError(f"{model}: is an encoder-decoder, which does not continue a text; give a decoder")
    return loaded, tokenizer


def _encode(tokenizer: Any, content: str, tokens: int) -> Tensor:
    """The first `tokens` token ids of a text, with the special tokens that the tokenizer puts before it."""
    with quiet():  # of texts longer than the model takes, which windows are for
        ids: Tensor = tokenizer(content, return_tensors="pt")["input_ids"][0][:tokens]
    return ids


def _limit(context: int, *models: Any) -> int:
    """`context`, or fewer tokens where a model takes no more: beyond, its predictions mean nothing."""
    limits: list[int] = [getattr(model.config.get_text_config(), "max_position_embeddings", 0) or 0 for model in models]
    return min([context, *(limit for limit in limits if limit > 0)])


def _agreement(reference: str, pairs: Pairs) -> Agreement:
    found = standard_error(pairs.kl)
    median, p99 = (float(value) for value in np.quantile(pairs.kl, (0.5, 0.99)))
    error = found[0] if found else None
    kl = Divergence(float(pairs.kl.mean()), error, median, p99, float(pairs.kl.max()), _by_position(pairs))
    ratio = _raised(interval(pairs.nll - pairs.reference_nll))
    return Agreement(
        reference, _perplexity(pairs.reference_nll), ratio, kl, float(pairs.same_top1.mean()), pairs.layers
    )


def _by_position(pairs: Pairs) -> list[Positions]:
    """At most 64 buckets of as many positions each, the last one perhaps fewer."""
    width = -(-int(pairs.positions.max()) // _BUCKETS)
    buckets = (pairs.positions - 1) // width
    counts, sums = np.bincount(buckets), np.bincount(buckets, pairs.kl)
    return [Positions(1 + i * width, int(counts[i]), float(sums[i] / counts[i])) for i in range(len(counts))]


def _perplexity(nll: Array) -> Estimate:
    return _raised(interval(nll))


def _raised(estimate: Estimate) -> Estimate:
    """exp of a figure and of both ends of its interval."""
    low, high = (None if end is None else _exp(end) for end in (estimate.low, estimate.high))
    return Estimate(_exp(estimate.value), low, high)


def _exp(value: float) -> float:
    try:
        return math.exp(value)
    except OverflowError:
        return math.inf


def _student(freedom: int) -> float:
    """Student's t that leaves 5% outside, for 9 degrees of freedom or more: within 0.0005.

    Abramowitz and Stegun 26.7.5, an expansion about the normal distribution's quantile.
    """
    z = statistics.NormalDist().inv_cdf((1 + _CONFIDENCE) / 2)
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + first / freedom + second / freedom**2 + third / freedom**3
