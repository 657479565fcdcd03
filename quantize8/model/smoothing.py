"""Smoothing: outliers of activations moved into the weights beforehand, where that changes no result.

SmoothQuant (Xiao et al. 2023, arXiv 2211.10438, section 4): input column k of the Linear layers that read one x [T, K]
is multiplied in their weights, and divided in what makes x, by

    s_k = max_t |x_tk|^alpha / max_n |w_nk|^(1 - alpha)

Here s_k is rounded to a power of two, so that both are exact in floating point, and with them all that the model
computes. Where a number would overflow its dtype or lose digits as a subnormal, s_k is 1. What makes x must be linear:

    a norm's gain                -> query, key and value; gate and up
    rows of value, and its bias  -> output: attention mixes positions, not columns; query heads share the value's rows
    rows of up, and its bias     -> down: act(gate) * up is linear in up

All this is read off known architectures by their names; what is not known is not smoothed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from quantize8.artifact.outliers import Calibrated
from quantize8.checkpoint import Checkpoint
from quantize8.checkpoint.base import QUANTIZABLE
from quantize8.checkpoint.native import architecture_of
from quantize8.checkpoint.smoothing import Factors, SmoothedCheckpoint
from quantize8.errors import SourceError
from quantize8.ops.reference import Array

# Norms with a plain gain that only these layers read, and a gated feed-forward. Gemma stores its gains less 1.
_KNOWN = frozenset({"LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"})
_LAYER = re.compile(r"(model\.layers\.\d+)\.self_attn\.o_proj\.weight")
_MOST = 15  # of |log2 s|: float16 has 30 powers of two for normal numbers; float32 holds the factors of two groups


@dataclass(frozen=True)
class _Group:
    """Layers that read one input [T, K], and the tensors whose rows [J] make it."""

    readers: list[str]  # weights [N, K]
    makers: list[str]  # tensors [J, ...], J <= K
    head: int = 0  # rows of a head, where several heads of the input are made by one of the maker; else 0

    def shared(self, columns: Array, rows: int) -> Array:
        """The largest of the columns [K] that each row [J] makes."""
        found: Array = self._by_row(columns, rows).max(axis=1).reshape(rows)
        return found

    def spread(self, made: Array, columns: int) -> Array:
        """The opposite: for each column [K] the value of the row [J] that makes it."""
        by_row = self._by_row(np.empty(columns, made.dtype), len(made))
        return np.broadcast_to(made.reshape(len(by_row), 1, -1), by_row.shape).reshape(columns)

    def _by_row(self, columns: Array, rows: int) -> Array:
        head = self.head or rows
        return columns.reshape(rows // head, -1, head)


def check_smoothable(checkpoint: Checkpoint) -> None:
    """Raise SourceError for a checkpoint that smoothing is not known to leave exact, from headers alone."""
    architecture = architecture_of(checkpoint.config)
    if architecture not in _KNOWN:
        raise SourceError(
            f"{checkpoint.name}: smoothing is not known to be exact for {architecture}; leave --smooth out"
        )
    if checkpoint.decoded:
        raise SourceError(f"{checkpoint.name}: is quantized, and is not smoothed; use its original, or leave it out")
    list(_groups(checkpoint))


def smooth(checkpoint: Checkpoint, calibrated: Mapping[str, Calibrated], alpha: float) -> SmoothedCheckpoint:
    """The checkpoint with its weights smoothed.

    Args: calibrated, statistics of each module's input over a text; alpha, 0 < alpha < 1, how much of the outliers
    goes into the weights. Raises SourceError as `check_smoothable` does.
    Reads the weights twice, a block at a time.
    """
    check_smoothable(checkpoint)
    factors: dict[str, Factors] = {}
    features = left = 0
    for group in _groups(checkpoint):
        known = calibrated.get(group.readers[0].removesuffix(".weight"))
        if known is None:  # a layer beyond those that config.json counts
            continue
        absmax = known.absmax
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
    """All groups, those first that change columns of a weight whose rows a later one changes."""
    tensors = checkpoint.tensors
    for name in tensors:
        if not (found := _LAYER.fullmatch(name)):
            continue
        attention, feed = f"{found[1]}.self_attn", f"{found[1]}.mlp"
        makers = {kind: [f"{kind}.weight"] for kind in (f"{attention}.v_proj", f"{feed}.up_proj")}
        for kind, parts in makers.items():
            parts += [f"{kind}.bias"] if f"{kind}.bias" in tensors else []
        value, up = makers.values()
        groups = [
            _Group([f"{attention}.{kind}_proj.weight" for kind in "qkv"], [f"{found[1]}.input_layernorm.weight"]),
            _Group([f"{feed}.{kind}_proj.weight" for kind in ("gate", "up")],
                   [f"{found[1]}.post_attention_layernorm.weight"]),
            _Group([name], value, _head(checkpoint, name, value[0]) if value[0] in tensors else 0),
            _Group([f"{feed}.down_proj.weight"], up),
        ]  # fmt: skip
        yield from (group for group in groups if _fits(checkpoint, group))


def _fits(checkpoint: Checkpoint, group: _Group) -> bool:
    """Whether all of a group is there, in dtypes that can be smoothed."""
    infos = [checkpoint.tensors.get(name) for name in (*group.readers, *group.makers)]
    return all(info is not None and info.dtype in QUANTIZABLE and 0 not in info.shape for info in infos)


def _head(checkpoint: Checkpoint, output: str, value: str) -> int:
    """Rows of one head of the value weight, where several query heads read it; 0 where each has its own."""
    wide, narrow = checkpoint.tensors[output].shape[-1], checkpoint.tensors[value].shape[0]
    if wide == narrow:
        return 0
    heads = checkpoint.config.get("num_attention_heads")
    size = wide // heads if isinstance(heads, int) and heads > 0 and wide % heads == 0 else 0
    if not size or narrow % size or wide % narrow:
        raise SourceError(
            f"{checkpoint.folder}: num_attention_heads {heads} in config.json does not fit {output} with {wide} "
            f"columns and {value} with {narrow} rows; fetch the checkpoint again"
        )
    return size


def _weight_absmax(checkpoint: Checkpoint, names: list[str]) -> Array:
    """Largest magnitude in each column of some weights [N, K]: float32 [K]."""
    blocks = (block for name in names for block in checkpoint.blocks(name))
    peaks = [np.abs(block.astype(np.float32)).max(axis=0) for block in blocks]
    found: Array = np.max(peaks, axis=0)
    return found


def _powers(absmax: Array, weights: Array, alpha: float) -> Array:
    """log2 of s: int32 [K]; 0 where a column of inputs or weights is zero, or not finite."""
    good = np.isfinite(absmax) & np.isfinite(weights) & (absmax > 0) & (weights > 0)
    x, w = (np.log2(np.where(good, peaks, 1).astype(np.float64)) for peaks in (absmax, weights))
    return np.clip(np.rint(alpha * x - (1 - alpha) * w), -_MOST, _MOST).astype(np.int32)


def _multiplied(group: _Group, power: Array, factors: Mapping[str, Factors], columns: int) -> dict[str, Factors]:
    """The factors of a group's tensors for s = 2^power [J], beside those that they have."""
    one = np.float32(1)
    wide = np.ldexp(one, group.spread(power, columns))
    found = {name: Factors(columns=wide) for name in group.readers}
    for name in group.makers:
        before = factors.get(name, Factors())
        found[name] = Factors(np.ldexp(one, -power), before.columns)
    return found
