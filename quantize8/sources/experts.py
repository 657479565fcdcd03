"""Experts of mixture-of-experts models: from one tensor for all experts to one matrix for each, and back.

transformers computes with fused experts: one parameter [E, N, K] holds a projection of all E experts, and the gate and
the up projection are often joined in it. Some checkpoints store these parameters (gpt-oss, Llama 4, Qwen3-VL-MoE,
GraniteMoE), others store a matrix for each expert, which transformers joins while loading (Mixtral, Qwen3-MoE,
DeepSeek). Loaders of quantized experts (vLLM, SGLang) want a matrix for each expert.

`SplitExperts` presents fused experts as matrices [N, K], and `FusedExperts` presents matrices as the parameters that
the model has. Both follow the layout that transformers' class of the experts declares (`layouts_of`).
"""

from __future__ import annotations

import inspect
import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from quantize8.kernels.reference import Array
from quantize8.sources.base import DTYPES, Checkpoint, TensorInfo
from quantize8.sources.wrapper import Wrapper

GATED, UNGATED, DOWN = "gate_up_proj", "up_proj", "down_proj"  # transformers' names of the parameters
GATE_AND_UP = ("gate_proj", "up_proj")  # the matrices of an expert that are joined in GATED
BIAS = "_bias"  # suffix of a parameter's name for its biases [E, N]
# a tensor of one expert
OF_EXPERT = re.compile(r"(?P<experts>.+)\.(?P<number>\d+)\.(?P<part>\w+)\.(?P<last>weight|bias)")
_IN_LAYER = re.compile(r"(.*\.\d+\.)?(.*)")  # up to the number of the layer, and the rest


@dataclass(frozen=True)
class Projection:
    """A parameter of fused experts.

    Attributes:
        name: Its name in the module of the experts.
        parts: Names of the matrices of one expert that it joins along N; the parameter's own name if it is one matrix.
        transposed: Whether the parameter is [E, K, N] instead of [E, N, K].
        known: Whether transformers can join the matrices while loading.
    """

    name: str
    parts: tuple[str, ...]
    transposed: bool
    known: bool = False


@dataclass(frozen=True)
class Layout:
    """The fused experts of one module of a model.

    Attributes:
        path: Name of the module in the model.
        count: Number of experts.
        projections: The parameters by name.
        interleaved: Whether rows of gate and up projection alternate, as in gpt-oss. These are kept together.
    """

    path: str
    count: int
    projections: Mapping[str, Projection]
    interleaved: bool

    def find(self, parameter: str) -> tuple[Projection, bool] | None:
        """The projection that a parameter of the module belongs to, and whether it is its bias."""
        for name in (parameter, parameter.removesuffix(BIAS)):
            if name in self.projections:
                return self.projections[name], name != parameter
        return None


class Slice(NamedTuple):
    """One expert's matrix [N, K] or bias [N] within a fused tensor of a checkpoint.

    Attributes:
        tensor: Name of the fused tensor.
        expert: Index of the expert.
        rows: Its rows among those of the projection [N, K] or [N].
        transposed: Whether the tensor is [E, K, N].
    """

    tensor: str
    expert: int
    rows: slice
    transposed: bool


class Fusion(NamedTuple):
    """A fused tensor, made of tensors of a checkpoint.

    Attributes:
        parameter: Name of the parameter in the model.
        parts: Names of the tensors by expert; each expert's are joined along N.
        transposed: Whether the fused tensor is [E, K, N].
        alternate: Whether the rows of the parts alternate instead of following each other.
    """

    parameter: str
    parts: tuple[tuple[str, ...], ...]
    transposed: bool
    alternate: bool


def layouts_of(model: Any, joined: Mapping[str, Sequence[str]]) -> dict[str, Layout]:
    """Find the fused experts of a model.

    Args:
        model: A transformers model.
        joined: What transformers joins while loading: the end of a parameter's name -> the names that it is made of,
            such as "experts.gate_up_proj" -> ["experts.*.w1.weight", "experts.*.w3.weight"].

    Returns:
        The layout by name of the module, for modules whose class follows transformers' conventions for experts.
    """
    layouts = {}
    for path, module in model.named_modules():
        if not (_follows_conventions(module) or is_dense(module)):
            continue
        first = GATED if hasattr(module, GATED) else UNGATED
        shapes = [tuple(getattr(getattr(module, name, None), "shape", ())) for name in (first, DOWN)]
        if all(len(shape) == 3 for shape in shapes) and (found := _layout(path, module, first, shapes, joined)):
            layouts[path] = found
    return layouts


def is_dense(module: Any) -> bool:
    """Whether a module computes each expert on its own block of tokens [E * T, H], as that of Llama 4 does."""
    if _follows_conventions(module) or not hasattr(module, GATED):
        return False
    return list(inspect.signature(module.forward).parameters) == ["hidden_states"]


def _follows_conventions(module: Any) -> bool:
    """Whether the class of a module has transformers' decorator for experts, which sets these attributes."""
    return hasattr(module, "has_gate") and module.has_gate == hasattr(module, GATED)


def _layout(
    path: str, module: Any, first: str, shapes: list[tuple[int, ...]], joined: Mapping[str, Sequence[str]]
) -> Layout | None:
    (count, *upper), (_, *lower) = shapes
    folded = 2 if first == GATED else 1
    # an expert maps H features to N, and N / folded back to H
    plain, turned = (lower[1] * folded, lower[0]) == tuple(upper), (lower[1], lower[0] * folded) == tuple(upper)
    transposed = bool(getattr(module, "is_transposed", turned and not plain))
    if not (turned if transposed else plain):
        return None
    interleaved = first == GATED and not getattr(module, "is_concatenated", True)
    projections = {}
    for name, parts in ((first, GATE_AND_UP if first == GATED and not interleaved else (first,)), (DOWN, (DOWN,))):
        target = f"{path}.{name}"
        sources = next((names for end, names in joined.items() if target.endswith(end)), ())
        named = tuple(source.rpartition("*.")[2].removesuffix(".weight") for source in sources)
        known = len(named) == len(parts)
        projections[name] = Projection(name, named if known else parts, transposed, known)
    return Layout(path, count, projections, interleaved)


def slices_of(tensor: TensorInfo, parameter: str, layout: Layout, turned: bool, alternate: bool) -> dict[str, Slice]:
    """Split a fused tensor of a checkpoint into one tensor for each expert and part.

    Args:
        tensor: The tensor, [E, N, K], [E, K, N], or [E, N] for biases.
        parameter: The parameter of the module that it is.
        layout: The layout of the module.
        turned: Whether the checkpoint stores the last two dimensions in the other order than the parameter.
        alternate: Whether it stores rows of gate and up projection in turns.

    Returns:
        The slices by name: the tensor's name up to the layer, the path of the module from there, expert and part.
    """
    found = layout.find(parameter)
    assert found is not None
    projection, is_bias = found
    transposed = not is_bias and projection.transposed != turned
    count = len(projection.parts)
    size = tensor.shape[1 if is_bias or not transposed else 2] // count
    start = _IN_LAYER.fullmatch(tensor.name)
    inside = _IN_LAYER.fullmatch(layout.path)
    assert start is not None and inside is not None
    base = f"{start[1] or ''}{inside[2]}"
    slices = {}
    for expert in range(tensor.shape[0]):
        for i, part in enumerate(projection.parts):
            rows = slice(i, None, count) if alternate else slice(i * size, (i + 1) * size)
            name = f"{base}.{expert}.{part}.{'bias' if is_bias else 'weight'}"
            slices[name] = Slice(tensor.name, expert, rows, transposed)
    return slices


def fusions_of(targets: Mapping[str, str], layouts: Mapping[str, Layout]) -> dict[str, Fusion]:
    """Find the tensors of single experts that the model has fused, and that transformers does not join.

    Args:
        targets: Name of a tensor of the checkpoint -> its name in the model, where that is no parameter.
        layouts: The layouts of the model's fused experts.

    Returns:
        The fusions by name of the fused tensor. Only those for which each expert has all its parts.
    """
    found: dict[tuple[str, str, str], dict[tuple[int, str], str]] = {}
    for name, target in targets.items():
        stored, inside = OF_EXPERT.fullmatch(name), OF_EXPERT.fullmatch(target)
        if stored and inside and inside["experts"] in layouts:
            key = (stored["experts"], inside["experts"], stored["last"])
            found.setdefault(key, {})[int(stored["number"]), stored["part"]] = name
    fusions = {}
    for (experts, path, last), tensors in found.items():
        layout = layouts[path]
        for projection in layout.projections.values():
            for parts in {projection.parts, GATE_AND_UP if projection.name == GATED else projection.parts}:
                names = tuple(tuple(tensors.get((e, part), "") for part in parts) for e in range(layout.count))
                if all(map(all, names)):
                    is_bias = last == "bias"
                    alternate = layout.interleaved and len(parts) > 1
                    name = f"{projection.name}{BIAS if is_bias else ''}"
                    transposed = projection.transposed and not is_bias
                    fusions[f"{experts}.{name}"] = Fusion(f"{path}.{name}", names, transposed, alternate)
    return fusions


class SplitExperts(Wrapper):
    """A checkpoint with fused experts, read as one tensor [N, K] or [N] for each expert and projection.

    Args:
        inner: The checkpoint.
        slices: The tensors of the experts by name, those of a fused tensor in its order.
    """

    def __init__(self, inner: Checkpoint, slices: Mapping[str, Slice]) -> None:
        super().__init__(inner, {})
        self.slices = slices
        self._last = threading.local()  # the last expert read: gate and up projection are parts of the same rows
        inside: dict[str, list[str]] = {}
        for name, part in slices.items():
            inside.setdefault(part.tensor, []).append(name)
        for info in inner.tensors.values():
            for name in inside.get(info.name, ()):
                self.tensors[name] = self._part(name, info)
            if info.name not in inside:
                self.tensors[info.name] = info
        split = {name for name, part in slices.items() if part.tensor in inner.decoded}
        self.decoded = inner.decoded - set(inside) | split

    def rows(self, name: str, start: int, stop: int) -> Array:
        """See `Checkpoint.rows`."""
        part = self.slices.get(name)
        if part is None:
            return super().rows(name, start, stop)
        key = (part.tensor, part.expert)
        if getattr(self._last, "key", None) != key:
            self._last.values = self.inner.rows(part.tensor, part.expert, part.expert + 1)[0]
            self._last.key = key
        values = self._last.values.T if part.transposed else self._last.values
        chosen: Array = np.ascontiguousarray(values[part.rows][start:stop])
        return chosen

    def blocks(self, name: str, block_bytes: int | None = None, multiple: int = 1) -> Iterator[Array]:
        """See `Checkpoint.blocks`."""
        if name in self.slices:
            return super().blocks(name, block_bytes, multiple)
        return self.inner.blocks(name, block_bytes, multiple)

    def _part(self, name: str, info: TensorInfo) -> TensorInfo:
        part = self.slices[name]
        shape = info.shape[:0:-1] if part.transposed else info.shape[1:]
        count = len(range(*part.rows.indices(shape[0])))
        return replace(info, name=name, shape=(count, *shape[1:]))


class FusedExperts(Wrapper):
    """A checkpoint with a tensor for each expert, read as the parameters that the model has.

    Args:
        inner: The checkpoint.
        fusions: The fused tensors by name.
    """

    def __init__(self, inner: Checkpoint, fusions: Mapping[str, Fusion]) -> None:
        super().__init__(inner, dict(inner.tensors))
        self.fusions = fusions
        for name, fusion in fusions.items():
            parts = [[self.tensors.pop(part) for part in expert] for expert in fusion.parts]
            shape = (sum(part.shape[0] for part in parts[0]), *parts[0][0].shape[1:])
            is_int8 = all(part.is_int8 for expert in parts for part in expert)
            whole = (len(parts), *(shape[::-1] if fusion.transposed else shape))
            # of parts with several dtypes, those that are changed as they are read are in float32
            lead = max((part for expert in parts for part in expert), key=lambda part: DTYPES[part.dtype].itemsize)
            self.tensors[name] = replace(lead, name=name, shape=whole, is_int8=is_int8, rotation=0)
        joined = {name for name, fusion in fusions.items() if fusion.parts[0][0] in inner.decoded}
        self.decoded = inner.decoded & set(self.tensors) | joined

    def rows(self, name: str, start: int, stop: int) -> Array:
        """See `Checkpoint.rows`."""
        fusion = self.fusions.get(name)
        if fusion is None:
            return super().rows(name, start, stop)
        whole = [self._joined(fusion, [self._whole(part) for part in parts]) for parts in fusion.parts[start:stop]]
        dtype = DTYPES[self.tensors[name].dtype]
        return np.stack([values.T if fusion.transposed else values for values in whole]).astype(dtype, copy=False)

    def int8_rows(self, name: str, start: int, stop: int) -> tuple[Array, Array]:
        """See `Checkpoint.int8_rows`; codes [n, N, K] and absmax [n, N], whatever the order of the parameter."""
        fusion = self.fusions.get(name)
        if fusion is None:
            return super().int8_rows(name, start, stop)
        codes, absmax = [], []
        for parts in fusion.parts[start:stop]:
            pairs = [self.inner.int8_rows(part, 0, self.inner.tensors[part].shape[0]) for part in parts]
            codes.append(self._joined(fusion, [pair[0] for pair in pairs]))
            absmax.append(self._joined(fusion, [pair[1] for pair in pairs]))
        return np.stack(codes), np.stack(absmax)

    def blocks(self, name: str, block_bytes: int | None = None, multiple: int = 1) -> Iterator[Array]:
        """See `Checkpoint.blocks`."""
        if name in self.fusions:
            return super().blocks(name, block_bytes, multiple)
        return self.inner.blocks(name, block_bytes, multiple)

    def _whole(self, name: str) -> Array:
        return np.concatenate(list(self.inner.blocks(name)))

    def _joined(self, fusion: Fusion, parts: list[Array]) -> Array:
        """The parts of one expert, joined along N."""
        if len(parts) == 1:
            return parts[0]
        if not fusion.alternate:
            return np.concatenate(parts)
        return np.stack(parts, axis=1).reshape(-1, *parts[0].shape[1:])
