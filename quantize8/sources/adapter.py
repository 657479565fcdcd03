"""A checkpoint with a LoRA adapter merged into it as it is read.

For a weight W [N, K], an adapter of PEFT stores A [R, K] and B [N, R] of a small rank R. Merged, the weight is

    LoRA     W + s B A, s = alpha / R             Hu et al. 2021 (arXiv:2106.09685), section 4.1
    rsLoRA   the same with s = alpha / sqrt(R)    Kalajdzievski 2023 (arXiv:2312.03732), section 3
    DoRA     m (W + s B A) / ||W + s B A||        Liu et al. 2024 (arXiv:2402.09353), section 4.1

where m [N] is stored too, and the norm is that of each output feature. Everything is computed in float32, in an order
that is fixed for each element. So the result depends neither on the machine, nor on how many rows are read at a time,
nor on the number of threads. It is rounded once: to int8, or to the dtype in which the base has the weight.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from quantize8.kernels import cpu
from quantize8.kernels.reference import Array
from quantize8.sources.base import BLOCK_BYTES, QUANTIZABLE, Checkpoint, TensorInfo
from quantize8.sources.lora import CONFIG_NAME, Adapter, Pair, open_adapter
from quantize8.sources.names import ModelNames, Stack
from quantize8.sources.untied import UntiedHead
from quantize8.sources.wrapper import Wrapper

_WRAPPED = ".base_layer"  # ends the name of a module within PEFT's wrapper of it
_Range = tuple[int | None, int | None, int | None]  # start, stop and step
_ALL: _Range = (None, None, None)


@dataclass(frozen=True)
class Factor:
    """One of two matrices whose product is added to a weight: some rows and columns of a tensor of the adapter.

    Attributes:
        tensor: The tensor, a matrix.
        transposed: Whether the matrix is the transpose of that.
        rows: The rows of the tensor.
        columns: The columns of the tensor.
    """

    tensor: str
    transposed: bool = False
    rows: _Range = _ALL
    columns: _Range = _ALL

    @property
    def is_whole(self) -> bool:
        """Whether the matrix is the tensor itself."""
        return not self.transposed and self.rows == self.columns == _ALL

    def of(self, values: Array) -> Array:
        """The matrix, float32, of the values of the tensor."""
        part = values[slice(*self.rows), slice(*self.columns)]
        return np.ascontiguousarray(part.T if self.transposed else part, np.float32)


@dataclass(frozen=True)
class LowRank:
    """What is added to a weight, in the orientation in which the checkpoint has it.

    Attributes:
        left: The matrix [rows, R].
        right: The matrix [R, columns].
        scaling: The factor of their product.
        magnitude: The tensor with DoRA's m; empty without.
        by_row: Whether m has a number for each row of the weight, or else for each column.
    """

    left: Factor
    right: Factor
    scaling: float
    magnitude: str = ""
    by_row: bool = True


@dataclass(frozen=True)
class Change:
    """What an adapter does to a tensor of the base.

    Attributes:
        replacement: The tensor of the adapter to read instead; empty if there is none.
        low_rank: What is added to the weight then.
        experts: What is added to each matrix of a stack of them [E, rows, columns].
        addend: The tensor of the adapter to add to a bias; empty if there is none.
        scaling: The factor of the addend.
    """

    replacement: str = ""
    low_rank: LowRank | None = None
    experts: tuple[LowRank, ...] = ()
    addend: str = ""
    scaling: float = 1.0

    @property
    def adds(self) -> bool:
        """Whether something is computed."""
        return self.low_rank is not None or bool(self.experts or self.addend)


class _Kept(threading.local):
    """What a thread has read of the adapter last: two tensors, and two matrices in float32 that it made of them."""

    def __init__(self) -> None:
        self.tensors, self.matrices = dict[str, Array](), dict[Factor, Array]()


class AdaptedCheckpoint(Wrapper):
    """A checkpoint read through an adapter. What is computed is float32, what is replaced has the adapter's dtype.

    Args:
        inner: The base.
        adapter: The adapter.
        changes: What it does to each tensor, by name in the base.
    """

    def __init__(self, inner: Checkpoint, adapter: Adapter, changes: Mapping[str, Change]) -> None:
        changed = {name: _changed(inner.tensors[name], adapter, change) for name, change in changes.items()}
        super().__init__(inner, {**inner.tensors, **changed})
        self.name = f"{inner.name}-{adapter.name}"
        self.identity = {**inner.identity, **adapter.identity}
        self.adapter, self.changes = adapter, changes
        self._factors: dict[str, Array] = {}  # DoRA's factors of columns, by name of the weight
        self._kept = _Kept()

    def fingerprint(self) -> dict[str, list[Any]]:
        """See `Checkpoint.fingerprint`; the files of the adapter are among them."""
        return {**super().fingerprint(), **self.adapter.weights.fingerprint()}

    def rows(self, name: str, start: int, stop: int) -> Array:
        """See `Checkpoint.rows`."""
        change = self.changes.get(name)
        if change is None:
            return super().rows(name, start, stop)
        return self._merged(name, change, self._before(name, change, start, stop), start)

    def blocks(self, name: str, block_bytes: int | None = None, multiple: int = 1) -> Iterator[Array]:
        """See `Checkpoint.blocks`."""
        change, start = self.changes.get(name), 0
        if change is not None and change.replacement:
            yield from super().blocks(name, block_bytes, multiple)
            return
        info, stored = self.tensors[name], self.inner.tensors[name]
        if change is not None and info.nbytes:  # the rows of a block are those of float32
            block_bytes = max(1, (block_bytes or BLOCK_BYTES) * stored.nbytes // info.nbytes)
        for values in self.inner.blocks(name, block_bytes, multiple):
            yield values if change is None else self._merged(name, change, values, start)
            start += len(values) if values.ndim else 1

    def _before(self, name: str, change: Change, start: int, stop: int) -> Array:
        """The rows of a tensor to which something is added."""
        if not change.replacement:
            return super().rows(name, start, stop)
        values = self.adapter.weights.rows(change.replacement, start, stop)
        self._check_finite(change.replacement, values)
        return values

    def _merged(self, name: str, change: Change, values: Array, start: int) -> Array:
        """The values of some rows of a tensor, the first of which is `start`, after a change."""
        if not change.adds:
            return values
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):  # reported below
            if change.experts:
                pairs = zip(change.experts[start:], values, strict=False)
                result: Array = np.stack([self._with_product(each, matrix, 0) for each, matrix in pairs])
            elif change.low_rank is None:
                addend = self.adapter.weights.rows(change.addend, start, start + len(values)).astype(np.float32)
                result = values.astype(np.float32) + np.float32(change.scaling) * addend
            else:
                result = self._with_product(change.low_rank, values, start)
                result = self._scaled(name, change.low_rank, result, start)
        if not cpu.all_finite(result) and cpu.all_finite(values):
            raise self.adapter.error(f"makes {name} of the base NaN or infinite; train it again, or fetch it again")
        return result

    def _with_product(self, change: LowRank, values: Array, start: int) -> Array:
        """W + s B A for some rows of a weight."""
        right = self._whole(change.right)
        if not change.left.is_whole:
            left = self._whole(change.left)[start : start + len(values)]
        else:
            left = self.adapter.weights.rows(change.left.tensor, start, start + len(values))
            self._check_finite(change.left.tensor, left)
        return cpu.add_low_rank(values, left, right, change.scaling)

    def _whole(self, factor: Factor) -> Array:
        """A matrix in float32, which the next block of rows needs again; the experts of a layer share a tensor."""
        tensors, matrices = self._kept.tensors, self._kept.matrices
        if factor not in matrices:
            if factor.tensor not in tensors:
                _make_room(tensors)
                tensors[factor.tensor] = self._all_rows(factor.tensor)
            _make_room(matrices)
            matrices[factor] = factor.of(tensors[factor.tensor])
        return matrices[factor]

    def _scaled(self, name: str, change: LowRank, merged: Array, start: int) -> Array:
        """DoRA: rows of W + s B A times m / ||W + s B A||; without DoRA, the rows themselves."""
        if not change.magnitude:
            return merged
        if not change.by_row and name not in self._factors:
            magnitude = self._all_rows(change.magnitude).astype(np.float32)
            self._factors[name] = magnitude / self._column_norms(name, change)
        if change.by_row:
            magnitude = self._all_rows(change.magnitude).astype(np.float32)[start : start + len(merged)]
            squares: Any = np.cumsum(np.square(merged, dtype=np.float64), axis=1)[:, -1]  # adds in order
            factors = (magnitude / np.sqrt(squares).astype(np.float32))[:, None]
        else:
            factors = self._factors[name]
        result: Array = factors * merged
        return result

    def _column_norms(self, name: str, change: LowRank) -> Array:
        """The norm of each column of W + s B A, float32 [columns]; the whole weight is read for it."""
        count, columns = self.tensors[name].shape
        squares, step = np.zeros(columns), max(1, BLOCK_BYTES // max(1, 4 * columns))
        for start in range(0, count, step):
            values = self._before(name, self.changes[name], start, min(start + step, count))
            for row in self._with_product(change, values, start):
                squares += np.square(row, dtype=np.float64)
        norms: Array = np.sqrt(squares).astype(np.float32)
        return norms

    def _all_rows(self, tensor: str) -> Array:
        """A tensor of the adapter."""
        values = self.adapter.weights.rows(tensor, 0, self.adapter.weights.tensors[tensor].shape[0])
        self._check_finite(tensor, values)
        return values

    def _check_finite(self, tensor: str, values: Array) -> None:
        if not cpu.all_finite(values):
            raise self.adapter.error(f"{tensor} holds NaN or infinity; train it again, or fetch it again")


def _make_room(held: dict[Any, Array]) -> None:
    """Drop all but the last of some arrays."""
    for key in list(held)[:-1]:
        del held[key]


def merged(base: Checkpoint, folder: str) -> AdaptedCheckpoint:
    """Open an adapter, and read a checkpoint through it.

    Args:
        base: The checkpoint that the adapter was trained on.
        folder: The folder with the adapter's settings and weights.

    Raises:
        SourceError: The adapter cannot be read or merged, or it belongs to another model.
        DependencyError: torch and transformers are needed to find the layers of this model, and missing.
    """
    adapter = open_adapter(folder)
    return _Merging(base, adapter).checkpoint()


class _Merging:
    """Finds out what an adapter does to each tensor of a base, and checks that it can."""

    def __init__(self, base: Checkpoint, adapter: Adapter) -> None:
        self._base, self._adapter = base, adapter
        self._names = ModelNames(base, [*(f"{module}.weight" for module in adapter.pairs), *adapter.replaced])
        self._changes: dict[str, Change] = {}

    def checkpoint(self) -> AdaptedCheckpoint:
        """The base, changed."""
        for weight, key in self._adapter.replaced.items():
            self._replace(self._find(weight, key), key)
        for module, pair in self._adapter.pairs.items():
            if (stack := self._stack(module)) is not None:
                self._add_to_experts(stack, pair)
            else:
                self._add(self._find(f"{module}.weight", pair.a), pair)
        return AdaptedCheckpoint(self._base, self._adapter, self._changes)

    def _find(self, weight: str, key: str) -> str:
        """The tensor that a name in the adapter stands for. A weight that is tied becomes one of its own."""
        base, adapter, apart = self._base, self._adapter, self._names.apart(weight)
        nested = any(isinstance(value, dict) and "tie_word_embeddings" in value for value in base.config.values())
        if apart is not None and not nested:
            stored, other = apart
            if other not in base.tensors:
                self._base = UntiedHead(base, stored, other)
            return other if self._names.stored(weight) is None else stored
        name = self._names.stored(weight)
        if name is None:
            trained = adapter.identity.get("adapter_base")
            hint = f"it was trained on {trained}" if trained else "name the model that it was trained on"
            raise adapter.error(f"{key} has no counterpart in {base.name}, which stores no {weight} of its own; {hint}")
        if tied := self._names.tied(name):
            raise adapter.error(
                f"{key} changes {name}, but the model uses the same weight as {tied[0]} (tie_word_embeddings); save "
                "the base with a weight for each, and name that as the source"
            )
        if (dtype := base.tensors[name].dtype) not in QUANTIZABLE:
            raise adapter.error(f"{key} changes {name}, which is {dtype} in the base; merge it with PEFT")
        return name

    def _replace(self, name: str, key: str) -> None:
        """Read a tensor of the adapter instead of one of the base."""
        shape, found = self._base.tensors[name].shape, self._adapter.weights.tensors[key].shape
        if name in self._changes:
            other = self._changes[name].replacement
            raise self._adapter.error(f"{key} and {other} both replace {name}; fetch the adapter again")
        if name in self._base.decoded and self._names.is_conv1d(name, self._adapter.settings.fan_in_fan_out):
            raise self._adapter.error(
                f"{key} replaces {name}, a Conv1D that is quantized in the base; use a base in float"
            )
        if len(shape) == len(found) == 2 and shape[1] == found[1] and shape[0] < found[0]:
            raise self._adapter.error(
                f"{key} has {found[0]} rows, and {name} of the base {shape[0]}: tokens were added; resize the "
                "embeddings of the base, save it with the adapter's tokenizer, and name that as the source"
            )
        _check_shape(self._adapter, key, shape)
        self._changes[name] = Change(key)

    def _add(self, name: str, pair: Pair) -> None:
        """Add the product of two matrices to a weight, and the bias of the second to the bias."""
        adapter, change = self._adapter, self._changes.get(name, Change())
        if change.low_rank is not None:
            raise adapter.error(f"{pair.a} and another tensor both change {name}; fetch the adapter again")
        self._changes[name] = replace(change, low_rank=self._low_rank(name, pair))
        if pair.bias:
            bias = f"{name.removesuffix('.weight')}.bias"
            if bias not in self._base.tensors:
                raise adapter.error(f"{pair.bias} has no bias in the base to be added to; merge it with PEFT instead")
            _check_shape(adapter, pair.bias, self._base.tensors[bias].shape)
            before = self._changes.get(bias, Change())
            self._changes[bias] = replace(before, addend=pair.bias, scaling=pair.scaling)

    def _stack(self, module: str) -> Stack | None:
        """The parameter that PEFT adapts under the name of its module.

        Several of a module are wrapped in each other, the first of the model innermost, as X.base_layer.base_layer.
        """
        owner = module
        while owner.endswith(_WRAPPED):
            owner = owner.removesuffix(_WRAPPED)
        found = [each for each in self._names.stacks(owner) if self._adapter.settings.targets(each.name)]
        depth = (len(module) - len(owner)) // len(_WRAPPED)
        return found[-1 - depth] if depth < len(found) and len(found[-1 - depth].shape) != 2 else None

    def _add_to_experts(self, stack: Stack, pair: Pair) -> None:
        """Add a product to the matrix of each expert: A is [E R, K], and B [N, E R] with the experts innermost."""
        adapter, base, (rank, scaling) = self._adapter, self._base, self._adapter.settings.of(stack.name)
        if len(stack.shape) != 3 or pair.embeds or pair.magnitude or pair.bias:
            raise adapter.error(f"{pair.a} is for {stack.name}, which is not merged as such; merge it with PEFT")
        count, outputs, inputs = stack.shape
        if stack.transposed:
            inputs, outputs = outputs, inputs
        _check_shape(adapter, pair.a, (count * rank, inputs))
        _check_shape(adapter, pair.b, (outputs, count * rank))

        def low_rank(expert: int, start: int | None = None, stop: int | None = None) -> LowRank:
            a = Factor(pair.a, stack.transposed, (expert * rank, (expert + 1) * rank, None))
            b = Factor(pair.b, stack.transposed, (start, stop, None), (expert, None, count))
            return LowRank(a, b, scaling) if stack.transposed else LowRank(b, a, scaling)

        name = self._names.stored(stack.name)
        if name is not None and base.tensors[name].shape == stack.shape and base.tensors[name].dtype in QUANTIZABLE:
            found = {name: Change(experts=tuple(map(low_rank, range(count))))}
        else:
            parts = [] if stack.transposed else self._names.parts(stack)
            ends = {part.name: part.start + base.tensors[part.name].shape[0] for part in parts}
            changes = (Change(low_rank=low_rank(each.expert, each.start, ends[each.name])) for each in parts)
            found = dict(zip(ends, changes, strict=True))
        if not found or any(base.tensors[each].dtype not in QUANTIZABLE for each in found):
            raise adapter.error(
                f"{pair.a} is for {stack.name}, which {base.name} does not store as matrices of its experts; "
                "merge it with PEFT"
            )
        if twice := sorted(found.keys() & self._changes.keys()):
            raise adapter.error(f"{pair.a} and another tensor both change {twice[0]}; fetch the adapter again")
        self._changes |= found

    def _low_rank(self, name: str, pair: Pair) -> LowRank:
        """What a pair of matrices adds to a weight, after a check of all shapes."""
        adapter, shape = self._adapter, self._base.tensors[name].shape
        a, b = (adapter.weights.tensors[key].shape for key in (pair.a, pair.b))
        # PEFT stores A [R, V] and B [H, R] for an embedding [V, H], as for the transpose of a Linear weight
        conv1d = self._names.is_conv1d(name, adapter.settings.fan_in_fan_out) and name not in self._base.decoded
        transposed = pair.embeds or conv1d
        if len(a) != 2 or len(b) != 2 or len(shape) != 2:
            raise adapter.error(
                f"{pair.a} {list(a)} and {pair.b} {list(b)} for {name} {list(shape)} are not matrices; merge with PEFT"
            )
        rank, inputs, outputs = a[0], a[1], b[0]
        if not rank == b[1] == pair.rank:
            raise adapter.error(
                f"{pair.a} has rank {rank}, {pair.b} rank {b[1]}, and {CONFIG_NAME} says {pair.rank}; fetch all again"
            )
        if shape != ((inputs, outputs) if transposed else (outputs, inputs)):
            raise adapter.error(
                f"{pair.a} {list(a)} and {pair.b} {list(b)} do not fit {name} {list(shape)} of the base; "
                "name the model that it was trained on"
            )
        if pair.magnitude:
            _check_shape(adapter, pair.magnitude, (outputs,))
        left, right = (pair.a, pair.b) if transposed else (pair.b, pair.a)
        return LowRank(
            Factor(left, transposed), Factor(right, transposed), pair.scaling, pair.magnitude, not transposed
        )


def _check_shape(adapter: Adapter, key: str, expected: tuple[int, ...]) -> None:
    found = adapter.weights.tensors[key].shape
    if found != expected:
        raise adapter.error(
            f"{key} has the shape {list(found)}, but the base requires {list(expected)}; "
            "name the model that it was trained on"
        )


def _changed(info: TensorInfo, adapter: Adapter, change: Change) -> TensorInfo:
    """A tensor as it is read after a change; in floating point it is written in the dtype that it has in the base."""
    dtype = "F32" if change.adds else adapter.weights.tensors[change.replacement].dtype
    return replace(info, dtype=dtype, is_int8=False, rotation=0, float_dtype=info.float_dtype or info.dtype)
