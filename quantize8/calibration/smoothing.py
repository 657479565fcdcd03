"""Smoothing: outliers of the activations are moved into the weights before quantizing, without changing any result.

SmoothQuant (Xiao et al. 2023, arXiv:2211.10438, section 4): consider the Linear layers that read the same input x
[T, K]. Column k of their weights is multiplied by s_k, and the operation that produces x divides its column k by s_k:

    s_k = max_t |x_tk|^alpha / max_n |w_nk|^(1 - alpha)

Here s_k is rounded to a power of two, so that both operations are exact in floating point, and everything that the
model computes stays the same. If a number would overflow its dtype or lose digits as a subnormal, s_k is 1. The
operation that produces x must be linear:

    a norm's gain                -> query, key and value; gate and up
    rows of value, and its bias  -> output: attention mixes positions, not columns; query heads share the value's rows
    rows of up, and its bias     -> down: act(gate) * up is linear in up

These groups are found by the tensor names of known architectures; other architectures are not smoothed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from quantize8.artifact.outliers import Calibrated
from quantize8.errors import SourceError
from quantize8.kernels.reference import Array
from quantize8.sources import Checkpoint
from quantize8.sources.base import QUANTIZABLE, architecture_of
from quantize8.sources.smoothing import Factors, SmoothedCheckpoint

# They have norms with a plain gain that only these layers read, and a gated feed-forward. Gemma's stored gains lack 1.
_KNOWN = frozenset({"LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"})
_LAYER = re.compile(r"(model\.layers\.\d+)\.self_attn\.o_proj\.weight")
# Limit of |log2 s|: float16 has 30 powers of two for normal numbers, and float32 can hold the factors of two groups
_MOST = 15


@dataclass(frozen=True)
class _Group:
    """The layers that read the same input [T, K], and the tensors whose rows [J] produce it."""

    readers: list[str]  # weights [N, K]
    makers: list[str]  # tensors [J, ...], J <= K
    head: int = 0  # rows of a head, if one head of the maker produces several heads of the input; else 0

    def shared(self, columns: Array, rows: int) -> Array:
        """For each row [J], the largest of the values [K] of the columns that it produces."""
        largest: Array = self._by_row(columns, rows).max(axis=1).reshape(rows)
        return largest

    def spread(self, values: Array, columns: int) -> Array:
        """For each column [K], the value of the row [J] that produces it."""
        by_row = self._by_row(np.empty(columns, values.dtype), len(values))
        return np.broadcast_to(values.reshape(len(by_row), 1, -1), by_row.shape).reshape(columns)

    def _by_row(self, columns: Array, rows: int) -> Array:
        head = self.head or rows
        return columns.reshape(rows // head, -1, head)


def check_smoothable(checkpoint: Checkpoint) -> None:
    """Raise SourceError if smoothing is not known to be exact for a checkpoint. Only headers are read."""
    architecture = architecture_of(checkpoint.config)
    if architecture not in _KNOWN:
        raise SourceError(
            f"{checkpoint.name}: smoothing is not known to be exact for {architecture}; leave --smooth out"
        )
    if checkpoint.decoded:
        raise SourceError(
            f"{checkpoint.name}: is quantized, and only floating-point weights can be smoothed; use the original "
            "checkpoint, or leave --smooth out"
        )
    list(_groups(checkpoint))


def smooth(checkpoint: Checkpoint, calibrated: Mapping[str, Calibrated], alpha: float) -> SmoothedCheckpoint:
    """Compute the smoothing factors of a checkpoint. This reads its weights twice, a block at a time.

    Args:
        checkpoint: The checkpoint, in floating point.
        calibrated: Statistics of the inputs of each module for a text.
        alpha: How much of the outliers moves into the weights, 0 < alpha < 1.

    Returns:
        The checkpoint with smoothed weights.

    Raises:
        SourceError: As in `check_smoothable`.
    """
    check_smoothable(checkpoint)
    factors: dict[str, Factors] = {}
    features = left = 0
    for group in _groups(checkpoint):
        statistics = calibrated.get(group.readers[0].removesuffix(".weight"))
        if statistics is None:  # config.json counts fewer layers than there are weights for
            continue
        absmax = statistics.absmax
        rows = checkpoint.tensors[group.makers[0]].shape[0]
        power = group.shared(_powers(absmax, _weight_absmax(checkpoint, group.readers), alpha), rows)
        asked = _multiplied(group, power, factors, len(absmax))
        trial = SmoothedCheckpoint(checkpoint, factors | asked)
        lost = np.zeros(rows, np.bool_)
        for name in group.readers:
            lost |= group.shared(trial.lossy(name), rows)
        for name in group.makers:
            lost |= trial.lossy(name)
        features, left = features + rows, left + int(lost.sum())
        factors |= _multiplied(group, np.where(lost, 0, power), factors, len(absmax))
    return SmoothedCheckpoint(checkpoint, factors, features, left)


def _groups(checkpoint: Checkpoint) -> Iterator[_Group]:
    """All groups. A group that changes columns of a weight comes before one that changes rows of it."""
    tensors = checkpoint.tensors
    for name in tensors:
        if not (match := _LAYER.fullmatch(name)):
            continue
        layer = match[1]
        attention, feed = f"{layer}.self_attn", f"{layer}.mlp"
        makers = {kind: [f"{kind}.weight"] for kind in (f"{attention}.v_proj", f"{feed}.up_proj")}
        for kind, names in makers.items():
            names += [f"{kind}.bias"] if f"{kind}.bias" in tensors else []
        value, up = makers.values()
        groups = [
            _Group([f"{attention}.{kind}_proj.weight" for kind in "qkv"], [f"{layer}.input_layernorm.weight"]),
            _Group([f"{feed}.{kind}_proj.weight" for kind in ("gate", "up")],
                   [f"{layer}.post_attention_layernorm.weight"]),
            _Group([name], value, _head(checkpoint, name, value[0]) if value[0] in tensors else 0),
            _Group([f"{feed}.down_proj.weight"], up),
        ]  # fmt: skip
        yield from (group for group in groups if _fits(checkpoint, group))


def _fits(checkpoint: Checkpoint, group: _Group) -> bool:
    """Whether all tensors of a group exist, in dtypes that can be smoothed."""
    infos = [checkpoint.tensors.get(name) for name in (*group.readers, *group.makers)]
    return all(info is not None and info.dtype in QUANTIZABLE and 0 not in info.shape for info in infos)


def _head(checkpoint: Checkpoint, output: str, value: str) -> int:
    """Rows of one head of the value weight, if several query heads share it; 0 if each has its own."""
    columns, rows = checkpoint.tensors[output].shape[-1], checkpoint.tensors[value].shape[0]
    if columns == rows:
        return 0
    heads = checkpoint.config.get("num_attention_heads")
    size = columns // heads if isinstance(heads, int) and heads > 0 and columns % heads == 0 else 0
    if not size or rows % size or columns % rows:
        raise SourceError(
            f"{checkpoint.folder}: num_attention_heads {heads} in config.json does not fit {output} with {columns} "
            f"columns and {value} with {rows} rows; fetch the checkpoint again"
        )
    return size


def _weight_absmax(checkpoint: Checkpoint, names: list[str]) -> Array:
    """The largest magnitude in each column of several weights [N, K] together: float32 [K]."""
    blocks = (block for name in names for block in checkpoint.blocks(name))
    peaks = [np.abs(block.astype(np.float32)).max(axis=0) for block in blocks]
    absmax: Array = np.max(peaks, axis=0)
    return absmax


def _powers(absmax: Array, weights: Array, alpha: float) -> Array:
    """log2 of s, int32 [K], from the largest |x| and |w| of each column [K]; 0 where one is zero or not finite."""
    good = np.isfinite(absmax) & np.isfinite(weights) & (absmax > 0) & (weights > 0)
    x, w = (np.log2(np.where(good, peaks, 1).astype(np.float64)) for peaks in (absmax, weights))
    return np.clip(np.rint(alpha * x - (1 - alpha) * w), -_MOST, _MOST).astype(np.int32)


def _multiplied(group: _Group, power: Array, factors: Mapping[str, Factors], columns: int) -> dict[str, Factors]:
    """The factors of a group's tensors for s = 2^power [J], combined with the factors that they already have."""
    one = np.float32(1)
    column_factors = np.ldexp(one, group.spread(power, columns))
    combined = {name: Factors(columns=column_factors) for name in group.readers}
    for name in group.makers:
        before = factors.get(name, Factors())
        combined[name] = Factors(np.ldexp(one, -power), before.columns)
    return combined
