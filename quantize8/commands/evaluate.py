"""Score how well a model predicts a text, and how close its predictions are to those of a reference model.

Perplexity is exp of the mean negative log-likelihood (natural log) of the scored tokens. KL divergence is
KL(reference || model) over the whole vocabulary, in nats per token. `calibration.scoring` defines which tokens are
scored.

Confidence intervals are 95% and use the method of batch means. Neighboring tokens are similarly hard to predict, so
the plain standard error, which assumes that they are independent, is too small. The S scored tokens, in the order of
the text, are split into blocks of sqrt(S) tokens; long blocks are nearly independent of each other. The standard error
of the mean is the standard deviation of the B block means / sqrt(B) (Flegal and Jones 2010, doi:10.1214/09-AOS735, for
batches of sqrt(S)), and the interval is mean +- t * error, with Student's t for B - 1 degrees of freedom. Windows
would be the natural blocks, but a text has too few of them. The intervals of perplexities and of their ratio are exp
of both ends. The interval of the ratio is computed from per-token differences, so that tokens which both models find
hard cancel out. An interval holds for text like the one that was scored.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from quantize8.calibration.scoring import Pairs, check_context, compare, likelihoods
from quantize8.calibration.text import open_for_text, read_text
from quantize8.errors import SourceError
from quantize8.files import TEXT
from quantize8.kernels.reference import Array, OutlierMode
from quantize8.runtime.loading import quiet

if TYPE_CHECKING:
    from torch import Tensor

DEFAULT_CONTEXT = 1024  # tokens; long enough that the start of a window, with little context, does not dominate
DEFAULT_TOKENS = 4096  # four windows of the default length; the bundled text is longer
_BUCKETS = 64  # ranges of positions in a window: enough for a plot
_CONFIDENCE = 0.95
_FEWEST = 100  # scored tokens that an interval needs: 10 blocks of 10


@dataclass(frozen=True)
class Perplexity:
    """exp of the mean negative log-likelihood (natural log) of the scored tokens."""

    perplexity: float
    scored: int  # number of tokens; the first of each window has no context and is not scored


@dataclass(frozen=True)
class Estimate:
    """A figure with its 95% confidence interval."""

    value: float
    low: float | None  # None where fewer than 100 tokens were scored
    high: float | None


@dataclass(frozen=True)
class Positions:
    """Mean KL divergence over a range of positions in the window."""

    first: int  # first position of the range, which is the number of tokens before it in the window
    tokens: int  # number of scored tokens in the range, over all windows
    kl: float  # nats per token


@dataclass(frozen=True)
class Divergence:
    """KL(reference || model) in nats per token."""

    mean: float
    standard_error: float | None  # of the mean; None where fewer than 100 tokens were scored
    median: float
    p99: float  # 99th percentile
    max: float
    by_position: list[Positions]


@dataclass(frozen=True)
class Agreement:
    """How close the predictions of a model are to those of its reference, on the same tokens."""

    reference: str
    perplexity: Estimate  # of the reference
    ratio: Estimate  # perplexity of the model / perplexity of the reference, from per-token differences
    kl: Divergence
    top1: float  # share of tokens for which both models rank the same token first
    layers: dict[str, float]  # decoder layer -> ||h - h_ref||_F / ||h_ref||_F of the hidden states after it


@dataclass(frozen=True)
class Evaluation:
    """How well a model predicts a text."""

    model: str
    tokens: int  # number of tokens of the text
    scored: int  # number of scored tokens: all but the first of each window
    context: int  # window length in tokens
    perplexity: Estimate
    agreement: Agreement | None = field(default=None)  # None without a reference


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
    """Compute the perplexity of a model on a text, and with `reference` also KL divergence and top-1 agreement.

    Both models are in memory at the same time; of their logits, only those of one window are.

    Args:
        model: A checkpoint or artifact: a folder, a GGUF file or a hub id.
        text: A text file in UTF-8. None uses a bundled text (the beginning of a message to the US Congress).
        reference: The model to compare with, such as the source that `model` was converted from.
        context: Window length in tokens. It is lowered to what both models support (max_position_embeddings).
        tokens: Number of tokens to use, from the start of the text; at least 2.
        layers: Compare the hidden states after each decoder layer as well. Needs `reference`.
        device: "auto", "cpu" or "cuda".
        mode: Outlier handling of `model`, as in `quantize8.load`. The reference runs as it is.
        threshold: Outlier threshold of `model`, 0 for none. None uses the stored one.
        revision: Branch, tag or commit of `model` on the hub.
        token: Hub token. None uses the one that `hf auth login` stored.

    Returns:
        An `Evaluation`; its `agreement` is None without a reference.

    Raises:
        SourceError: A model or the text cannot be read, the text has fewer than two tokens, the models do not share
            tokenizer and vocabulary, or logits are not finite.
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
        raise SourceError(f"{reference}: its tokenizer splits the text differently; use a reference with the same one")
    context = _limit(context, loaded, other)
    pairs = compare(loaded, other, ids, context, layers)
    agreement = _agreement(reference, pairs)
    return Evaluation(model, len(ids), len(pairs.nll), context, _perplexity(pairs.nll), agreement)


def perplexity(model: Any, ids: Tensor, context: int = DEFAULT_CONTEXT) -> Perplexity:
    """Compute the perplexity of a loaded causal model.

    Args:
        model: A transformers model.
        ids: Token ids [T].
        context: Window length in tokens; windows do not overlap.

    Raises:
        SourceError: There are fewer than two tokens, or logits are not finite.
    """
    nll = likelihoods(model, ids, context)
    return Perplexity(_exp(float(nll.mean())), len(nll))


def standard_error(values: Array) -> tuple[float, int] | None:
    """Return the standard error of the mean of correlated values, and its degrees of freedom, by batch means.

    Args:
        values: One value per token [S], in the order of the text.

    Returns:
        (standard error, degrees of freedom), or None for fewer than 100 values.
    """
    if len(values) < _FEWEST:
        return None
    blocks = np.array_split(values, len(values) // math.isqrt(len(values)))
    means = [float(block.mean()) for block in blocks]
    return statistics.stdev(means) / math.sqrt(len(means)), len(means) - 1


def interval(values: Array) -> Estimate:
    """The mean of correlated values [S], which are in the order of the text, with its 95% confidence interval."""
    mean, found = float(values.mean()), standard_error(values)
    if found is None:
        return Estimate(mean, None, None)
    error, freedom = found
    reach = _student(freedom) * error
    return Estimate(mean, mean - reach, mean + reach)


def _check(context: int, tokens: int, threshold: float | None, layers_alone: bool) -> None:
    check_context(context)
    if tokens < 2:
        raise SourceError(f"tokens {tokens}: must be 2 or more, because the first token is not scored")
    if threshold is not None and not 0 <= threshold < math.inf:
        raise SourceError(f"threshold {threshold:g}: must be 0 (off) or a positive number")
    if layers_alone:
        raise SourceError("layers: compares hidden states with those of a reference; add --reference")


def _open(model: str, device: str, *options: Any, **more: Any) -> tuple[Any, Any]:
    loaded, tokenizer = open_for_text(model, device, *options, **more)
    if loaded.config.is_encoder_decoder:
        raise SourceError(f"{model}: is an encoder-decoder, which cannot be scored on a text; use a decoder-only model")
    return loaded, tokenizer


def _encode(tokenizer: Any, content: str, tokens: int) -> Tensor:
    """The first `tokens` token ids of a text, with the special tokens that the tokenizer adds before it."""
    with quiet():  # transformers warns of a text longer than the context, which is split into windows here
        ids: Tensor = tokenizer(content, return_tensors="pt")["input_ids"][0][:tokens]
    return ids


def _limit(context: int, *models: Any) -> int:
    """`context`, limited to what the models support: beyond that, predictions are meaningless."""
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
    """At most 64 buckets of equal width; the last one may have fewer positions."""
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
    """The two-sided 95% quantile of Student's t, accurate to 0.0005 from 9 degrees of freedom.

    Abramowitz and Stegun 26.7.5, an expansion around the quantile of the normal distribution.
    """
    z = statistics.NormalDist().inv_cdf((1 + _CONFIDENCE) / 2)
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + first / freedom + second / freedom**2 + third / freedom**3
