"""Codes chosen as GPTQ does, for all layers of a model in one pass over a text.

A model runs layer by layer. Before a Linear layer computes, its input gives a Gram matrix, the Gram matrix the codes
(`kernels.rounding`), and for this pass the dequantized codes replace the weight: later layers are rounded for the
inputs that they will have (GPTQ, Frantar et al. 2022, arXiv:2210.17323, section 3.3). Memory holds one decoder layer in
float32, one matrix in float64, and the activations of the text between two layers.

The codes are the same on every processor, with any number of threads. The kernels compute the same bits, so all depends
on their inputs. The model computes in float64 (`runtime.double`), where runs on different processors differ by about
2e-15 of an input's RMS, and the inputs are rounded so coarsely (`rounded_inputs`) that this vanishes, unless a value is
that close to the middle between two rounded ones. On SmolLM2-135M, between torch with AVX-512 and without any vector
instructions, the chance is 1e-13 for a value: 2e-5 for all 2e8 values of 2048 tokens, 5e-5 for a model with a billion
parameters. (Rounding to bfloat16 alone, whose small numbers are dense, has a hundred times the chance.) Routers and
rotations of positions decide nothing from values that could be so close, except by the same chance.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from quantize8.calibration.activations import dense_weight, linear_layers
from quantize8.calibration.experts import RoundedExperts, experts_of
from quantize8.calibration.text import context_of, first_ids
from quantize8.errors import SourceError
from quantize8.kernels import cpu
from quantize8.kernels.reference import INT8_MAX, Array
from quantize8.kernels.rounding import MOST_INPUT, accumulate, factor, nearest_codes, round_codes
from quantize8.runtime.double import as_written, in_double
from quantize8.runtime.streaming import streamed
from quantize8.sources import Checkpoint
from quantize8.sources.reading import read_by_code
from quantize8.sources.structure import CONV1D, Structure, structure_of, with_separate_experts

ROUNDING_TOKENS = 4096  # with 2048, more of the error balances on this text alone; time grows with the number
WINDOW = 512  # tokens that a model reads at once: attention in float64 needs memory for the square of it
LEAST_TOKENS = 64
_STEP_BITS = 4  # log2 of a feature's mean magnitude in steps, rounded down
_BFLOAT16_BITS = 8  # significant bits of a bfloat16 number


class Rates(NamedTuple):
    """Multiplications per second: of a product in float64, a Gram matrix, a factor, and the choice of codes."""

    product: float
    gram: float
    factor: float
    codes: float


def sample_rates(size: int = 1024) -> Rates:
    """Measure the parts of the choice on a layer [size, size] of random numbers, with as many tokens."""
    threads, random = torch.get_num_threads(), np.random.default_rng(0)
    x = torch.from_numpy(random.standard_normal((size, size)))
    values, weight = rounded_inputs(x), random.standard_normal((size, size), np.float32)
    scales = np.abs(weight).max(axis=1, keepdims=True) / np.float32(INT8_MAX)
    gram, found = np.zeros((size, size)), []

    def timed(make: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        result = make()
        found.append(size**3 / (time.perf_counter() - start))
        return result

    timed(lambda: x @ x.t())
    timed(lambda: accumulate(gram, values, threads))
    order, carried = timed(lambda: factor(gram, threads))
    timed(lambda: round_codes(weight, scales, order, carried, threads))
    return Rates(*found)


class Rounding(Protocol):
    """What decides about weights, by the names under which a checkpoint stores them, experts one by one."""

    def wants(self, name: str) -> bool:
        """Whether to choose codes for a weight."""

    def rotation(self, name: str) -> int:
        """The block size of the Hadamard rotation of the weight's input; 0 for none."""

    def scales(self, name: str, weight: Array, importance: Array) -> tuple[Array, Array]:
        """The weight as it is rounded, float32 [N, K], and its scales, float32 [N, G].

        Args:
            name: The weight's name.
            weight: The weight, rotated if its input is, float32 [N, K].
            importance: Mean square of each input feature, rotated if the input is, float32 [K].
        """

    def stored(self, name: str) -> tuple[Array, Array] | None:
        """Codes int8 [N, K] and scales float32 [N, G] that an earlier run kept; None if there are none."""

    def keep(self, name: str, codes: Array, scales: Array, is_nearest: bool) -> None:
        """Take the codes int8 [N, K] and scales float32 [N, G] of a weight, and whether they are to nearest."""


@dataclass(frozen=True)
class RoundingReport:
    """How the codes of a model were chosen.

    Attributes:
        tokens: Tokens of the text that were read.
        chosen: Number of weights whose codes were chosen from their inputs, in this run or an earlier one.
        nearest: Names of the weights that were rounded to nearest: experts that the text hardly reaches, and layers
            that the model does not run for a text.
    """

    tokens: int
    chosen: int
    nearest: list[str]


def choose_codes(
    checkpoint: Checkpoint,
    text: str,
    rounding: Rounding,
    tokens: int = ROUNDING_TOKENS,
    progress: Callable[[int, int], None] | None = None,
) -> RoundingReport:
    """Choose the codes of all weights that are wanted.

    Args:
        checkpoint: The model.
        text: The calibration text.
        rounding: Decides about the weights, and takes the codes.
        tokens: Number of tokens of the text to use, from its start.
        progress: Called with the source bytes of the finished and of all weights.

    Raises:
        SourceError: The model cannot run, has no tokenizer, is an encoder-decoder, or computes NaN or infinity.
    """
    run = _Pass(checkpoint, structure_of(checkpoint), rounding, progress)
    cpu.share_threads(cpu.library())
    with in_double(), streamed(checkpoint, torch.float64, run.narrow) as model, torch.no_grad():
        ids = _windows(first_ids(checkpoint, model, text, tokens), min(WINDOW, context_of(model) or WINDOW))
        with run.attached(model), suppress(_Finished):
            model(ids)
    run.round_others()
    return RoundingReport(ids.numel(), len(run.done) - len(run.nearest), run.nearest)


def _windows(ids: Tensor, most: int) -> Tensor:
    """Token ids [T] cut into windows of the same length, [B, C] with C <= `most`; fewer than B tokens are dropped."""
    count = max(1, -(-len(ids) // most))
    length = len(ids) // count
    return ids[: count * length].view(count, length)


class _Finished(Exception):
    """Nothing that is wanted comes after this."""


@dataclass
class _Input:
    """The input of a layer, which others may share, as the query, key and value layers do.

    Attributes:
        values: A reference, so that no later tensor reuses its memory.
        version: Of the values.
        size: Of the blocks in which they are rotated; 0 for none.
        importance: float32 [K], their mean squares.
        carried: Order and factor, as of `kernels.rounding.factor`; None if there are too few tokens.
    """

    values: Tensor
    version: int
    size: int
    importance: Array
    carried: tuple[Array, Array] | None

    def is_of(self, x: Tensor, size: int) -> bool:
        """Whether this is the input x, rotated in blocks of a size."""
        same = (self.values.data_ptr(), self.values.shape, self.version) == (x.data_ptr(), x.shape, x._version)
        return same and self.size == size


class _Pass:
    """One pass over a text.

    Attributes:
        narrow: Parameters of the model whose float32 values are read here.
        done: Names of the finished weights.
        nearest: Names of those among them that were rounded to nearest.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        structure: Structure,
        rounding: Rounding,
        progress: Callable[[int, int], None] | None,
    ) -> None:
        self._checkpoint, self._structure, self._rounding, self._progress = checkpoint, structure, rounding, progress
        self._separate, separate = with_separate_experts(checkpoint, structure)
        modules = [*separate.linears, *separate.kept, *separate.experts]
        names = [f"{module}.weight" for module in modules if f"{module}.weight" in self._separate.tensors]
        self._wanted = {name: None for name in names if rounding.wants(name)}  # a set that keeps their order
        self._wanted_bytes = sum(self._separate.tensors[name].nbytes for name in self._wanted)
        self._finished_bytes = 0
        self._last: _Input | None = None
        self.narrow: set[str] = set()
        self.done: set[str] = set()
        self.nearest: list[str] = []

    @contextmanager
    def attached(self, model: Any) -> Iterator[None]:
        """Replace the wanted weights of a model whenever it computes, and stop after the last of them."""
        stored = {inside: name for name, inside in self._structure.model_names.items()}
        head, read = model.get_output_embeddings(), read_by_code(model)
        with ExitStack() as stack:
            self._keep_embedding_narrow(model, stack)
            for path, module in linear_layers(model):
                name = f"{stored.get(path, path)}.weight"
                if name in self._wanted:
                    replaced = _Replaced(partial(self.replace, name))
                    stack.callback(module.register_forward_pre_hook(replaced.enter).remove)
                    stack.callback(module.register_forward_hook(replaced.leave, prepend=True, always_call=True).remove)
                    self.narrow |= {f"{path}.weight"} - {f"{other}.weight" for other in read}
                elif module is head:
                    stack.callback(module.register_forward_pre_hook(_stop, prepend=True).remove)
            layouts, parts = experts_of(model, self._checkpoint, self._structure)
            for path, layout in layouts.items():
                module = model.get_submodule(path)  # also without a wanted matrix: their own code may lack float64
                rounded = RoundedExperts(path, module, layout, parts, self._wanted, self.replace)
                module.forward = rounded.forward
                stack.callback(delattr, module, "forward")
                self.narrow |= {f"{path}.{name}" for name in layout.projections}
            yield

    def replace(self, name: str, weight: Array, x: Tensor) -> Array:
        """The dequantized codes [N, K] of a weight float32 [N, K] with the input x [..., K]."""
        size = self._rounding.rotation(name)
        kept = self._rounding.stored(name)
        if kept is None:
            known = self._input(name, x, size)
            weight, scales = self._rounding.scales(name, _rotated(weight, size), known.importance)
            if known.carried is None:
                codes = nearest_codes(weight, scales)
            else:
                codes = round_codes(weight, scales, *known.carried, torch.get_num_threads())
            self._rounding.keep(name, codes, scales, known.carried is None)
        else:
            codes, scales = kept
        self._note(name, x.numel() < LEAST_TOKENS * x.shape[-1])
        return _rotated(_dequantized(codes, scales), size)

    def round_others(self) -> None:
        """Round the wanted weights that had no input to nearest."""
        for name in self._wanted:
            if name in self.done:
                continue
            if self._rounding.stored(name) is None:
                weight = _rotated(self._read(name), self._rounding.rotation(name))
                weight, scales = self._rounding.scales(name, weight, np.ones(weight.shape[1], np.float32))
                self._rounding.keep(name, nearest_codes(weight, scales), scales, is_nearest=True)
            self._note(name, is_nearest=True)

    def _keep_embedding_narrow(self, model: Any, stack: ExitStack) -> None:
        """Leave the embedding in float32, often the largest tensor, and convert its output."""
        embedding = model.get_input_embeddings()
        if isinstance(embedding, nn.Embedding):
            name = next(name for name, module in model.named_modules() if module is embedding)
            stack.callback(embedding.register_forward_hook(lambda _module, _inputs, output: output.double()).remove)
            self.narrow.add(f"{name}.weight")

    def _input(self, name: str, x: Tensor, size: int) -> _Input:
        if self._last is None or not self._last.is_of(x, size):
            self._last = None  # its memory is free before more is taken
            self._last = self._measured(name, x, size)
        return self._last

    def _measured(self, name: str, x: Tensor, size: int) -> _Input:
        rows = x.detach().reshape(-1, x.shape[-1])
        if size:
            # in float64, as rounding to float32 first would keep differences between processors more often
            matrix = torch.from_numpy(cpu.rotate(np.eye(size, dtype=np.float32), size)).double()
            rows = (rows.reshape(-1, size) @ matrix).reshape(rows.shape)
        values = rounded_inputs(rows)
        if not (np.abs(values) < MOST_INPUT).all():
            raise SourceError(
                f"{self._checkpoint.name}: the text makes the input of {name.removesuffix('.weight')} NaN or "
                "infinite; use another text"
            )
        gram = np.zeros((values.shape[1], values.shape[1]))
        threads = torch.get_num_threads()
        accumulate(gram, values, threads)
        importance = (gram.diagonal() / max(1, len(values))).astype(np.float32)
        carried = factor(gram, threads) if len(values) >= LEAST_TOKENS else None
        return _Input(x, x._version, size, importance, carried)

    def _note(self, name: str, is_nearest: bool) -> None:
        if name not in self.done:
            self._finished_bytes += self._separate.tensors[name].nbytes
        self.done.add(name)
        if is_nearest:
            self.nearest.append(name)
        if self._progress is not None:
            self._progress(self._finished_bytes, self._wanted_bytes)

    def _read(self, name: str) -> Array:
        """A weight float32 [N, K], from the checkpoint."""
        weight = np.concatenate([block.astype(np.float32) for block in self._separate.blocks(name)])
        is_conv1d = self._structure.linears.get(name.removesuffix(".weight")) == CONV1D
        return np.ascontiguousarray(weight.T) if is_conv1d and name not in self._separate.decoded else weight


class _Replaced:
    """Hooks of a layer that compute with another weight, and then give it back its own."""

    def __init__(self, replace: Callable[[Array, Tensor], Array]) -> None:
        self._replace = replace
        self._own: nn.Parameter | None = None

    def enter(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        """Before the layer computes."""
        with as_written():
            weight = torch.from_numpy(self._replace(dense_weight(module).contiguous().numpy(), inputs[0]))
            turned = weight.t() if isinstance(module, Conv1D) else weight
            self._own = module._parameters["weight"]
            module._parameters["weight"] = nn.Parameter(turned.to(inputs[0].dtype), requires_grad=False)

    def leave(self, module: nn.Module, *_: Any) -> None:
        """After it has computed."""
        if self._own is not None:
            module._parameters["weight"], self._own = self._own, None


def rounded_inputs(x: Tensor) -> Array:
    """Inputs float64 [T, K] of a layer as bfloat16 numbers, but none closer together than a step that each feature has.

    The step is the largest power of two up to 1/16 of the feature's mean magnitude, which one huge token hardly
    changes. On SmolLM2-135M it adds at most 1.5e-4 to the energy of a feature, little beside the damping of 5%.

    Returns:
        float32 [T, K]; not finite where x is not.
    """
    _, exponents = torch.frexp(x.abs().mean(0))
    steps = torch.ldexp(torch.ones_like(x[:1]), exponents - 1 - _STEP_BITS)
    values = torch.empty(x.shape, dtype=torch.float32)
    for start in range(0, len(x), WINDOW):
        part = x[start : start + WINDOW]
        coarse, exact = (part / steps).round_().mul_(steps), part.to(torch.float32).to(torch.bfloat16)
        fits = coarse.abs() <= 2**_BFLOAT16_BITS * steps
        values[start : start + WINDOW] = torch.where(fits, coarse.to(torch.float32), exact.to(torch.float32))
    result: Array = values.numpy()
    return result


def _stop(*_: Any) -> None:
    raise _Finished


def _rotated(values: Array, size: int) -> Array:
    """float32 [N, K], rotated in blocks of a size."""
    rotated: Array = cpu.rotate(np.ascontiguousarray(values), size) if size else values
    return rotated


def _dequantized(codes: Array, scales: Array) -> Array:
    """code * scale, as loaders read it, float32 [N, K]; 0 where a scale is not finite, and the row is refused later."""
    steps = np.where(np.isfinite(scales), scales, np.float32(0))
    values = codes.reshape(*scales.shape, -1).astype(np.float32) * steps[..., None]
    return values.reshape(codes.shape)
