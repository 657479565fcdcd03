"""The check of an artifact against its source: every parameter is compared, and some tokens run through both models.

Both are read as transformers' loaders read them, in float32, one parameter or decoder layer at a time, so memory holds
two of the largest. A parameter that is stored in floating point must equal the source's after rounding. A row of an
int8 parameter must be as close to the source's as rounding with a scale from its absmax brings it. Weights are
dequantized for the check, so the error of 8-bit activations is not included.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from quantize8.errors import ArtifactError, DependencyError, SourceError
from quantize8.files import TEXT
from quantize8.formats.gguf.reader import GgufCheckpoint
from quantize8.kernels import GPTQ, NEAREST
from quantize8.kernels.reference import FLOAT16_MAX
from quantize8.runtime.comparison import Check as Check
from quantize8.runtime.loading import find_tokenizer, quiet
from quantize8.runtime.streaming import Weights, empty_model, streamed
from quantize8.sources import Checkpoint
from quantize8.sources.base import READERS, model_dtype
from quantize8.sources.experts import layouts_of
from quantize8.sources.native import is_known
from quantize8.sources.structure import as_transformers_loads

TOKENS = 32
_BLOCK = 2**20  # numbers of a parameter that are compared at a time: 4 MiB in each model
# A row with absmax a, rounded to steps of a / 127, has an RMS error of at most a / 254, and so have rows with searched
# scales. The factor 1.05 allows for scales that are rounded to 16 bits.
_ROW_ERROR = 1.05 / 254
# Codes that are chosen by the output's error make up for each other, and are farther off by themselves: up to 1.4 times
# the above in rows of SmolLM2-135M, while a row in the wrong place is off by a hundred times as much.
_CHOSEN = 4.0
_FLOOR = 4e-6  # an absmax below this gives Q8_0 a float16 scale of zero
_ROUNDING = 2.0**-8  # bound on the relative error of rounding to bfloat16; that to float16 is smaller
_SUBNORMAL = 2.0**-24  # the smallest positive float16
_BROKEN = 0.5  # relative error of the outputs from which an artifact is broken; int8 weights cause at most 0.1


def check(source: Checkpoint, artifact: Checkpoint, rounding: str = NEAREST) -> Check:
    """Compare an artifact with the checkpoint that it was made from.

    Args:
        source: The checkpoint.
        artifact: The artifact, opened as a checkpoint.
        rounding: How its codes were chosen, nearest or gptq.

    Raises:
        ArtifactError: A parameter differs from the source's by more than rounding, or the outputs are not finite or
            far from the source's.
    """
    start = time.perf_counter()
    if not is_known(source.config):
        return Check(skipped="transformers does not know the model")
    try:
        with quiet():
            parameters = _compare_parameters(source, artifact, _CHOSEN if rounding == GPTQ else 1.0)
        result = _compare_outputs(source, artifact)
    except SourceError as error:
        raise ArtifactError(f"{artifact.folder}: is broken: {error}") from None
    return replace(result, parameters=parameters, seconds=time.perf_counter() - start)


def _compare_parameters(source: Checkpoint, artifact: Checkpoint, allowance: float) -> int:
    source, artifact = as_transformers_loads(source), as_transformers_loads(artifact)
    model = empty_model(artifact)
    theirs, ours = Weights(empty_model(source), source), Weights(model, artifact)
    if not (theirs.complete and ours.complete):
        return 0  # transformers generates or splits some of them, so that only the outputs can be compared

    shapes = {name: tuple(value.shape) for name, value in model.named_parameters()}
    turned = {
        f"{path}.{projection.name}"
        for path, layout in layouts_of(model, {}).items()
        for projection in layout.projections.values()
        if projection.transposed
    }

    def compare(name: str) -> None:
        stored, fault = ours.stored_as(name), _float_fault
        if _is_int8(artifact, stored):
            fault = partial(_row_fault, artifact.tensors[stored[0]].rotation, allowance)
        pairs = _pairs(ours, theirs, name, shapes[name])
        if name in turned:
            pairs = ((actual.mT, expected.mT) for actual, expected in pairs)
        wrong = sum(fault(*pair) if pair[0].shape == pair[1].shape else len(pair[1]) for pair in pairs)
        if wrong:
            kind = "numbers are different" if fault is _float_fault else "rows are off by more than int8 rounding"
            raise ArtifactError(
                f"{artifact.folder}: {name} differs from the source ({wrong:,} {kind}); convert the source again"
            )

    with ThreadPoolExecutor(READERS) as pool:
        list(pool.map(compare, shapes))
    return len(shapes)


def _pairs(ours: Weights, theirs: Weights, name: str, shape: tuple[int, ...]) -> Iterator[tuple[Tensor, Tensor]]:
    """A parameter of both models in float32: a block of rows at a time if each stores it as one tensor, else whole."""
    if not shape or not (ours.is_one_tensor(name) and theirs.is_one_tensor(name)):
        actual, expected = ours.read(name), theirs.read(name)
        yield (actual.t(), expected.t()) if ours.is_transposed(name) else (actual, expected)
        return
    step = max(1, _BLOCK // max(1, math.prod(shape[1:])))
    for start in range(0, shape[0], step):
        rows = start, min(start + step, shape[0])
        yield ours.rows(name, *rows), theirs.rows(name, *rows)


def _is_int8(artifact: Checkpoint, stored: list[str]) -> bool:
    if isinstance(artifact.origin, GgufCheckpoint):
        return any(len(artifact.tensors[name].shape) > 1 for name in stored)
    return any(name in artifact.decoded for name in stored)


def _float_fault(actual: Tensor, expected: Tensor) -> int:
    """The count of numbers that differ from the source's by more than rounding; every NaN counts."""
    bound = expected.abs().mul_(_ROUNDING).add_(_SUBNORMAL)
    return actual.numel() - int(((actual - expected).abs_() <= bound).sum())


def _row_fault(rotation: int, allowance: float, actual: Tensor, expected: Tensor) -> int:
    """The count of int8 rows [..., K] that differ from the source's by more than `allowance` times rounding to int8.

    No element of a block of features becomes larger by a rotation than the norm of the block.
    """
    peaks = expected.unflatten(-1, (-1, rotation)).norm(dim=-1).amax(-1) if rotation else expected.abs().amax(-1)
    bound = peaks.mul_(_ROW_ERROR * allowance).add_(_FLOOR)
    error = (actual - expected).square_().mean(-1).sqrt_()
    return error.numel() - int((error <= bound).sum())


def _compare_outputs(source: Checkpoint, artifact: Checkpoint) -> Check:
    with streamed(source) as model:
        if model.main_input_name != "input_ids":
            return Check(skipped=f"outputs: the model needs {model.main_input_name} as input, not text alone")
        model.config.use_cache = False
        ids = _ids(source, model)
        expected, are_logits = _output(model, ids)
    if not expected.isfinite().all():
        return Check(skipped="outputs: the source itself computes NaN or infinity")
    with streamed(artifact) as model, _watched(model) as peaks:
        model.config.use_cache = False
        actual, _ = _output(model, ids)
    folder = artifact.folder
    if actual.shape != expected.shape or not actual.isfinite().all():
        raise ArtifactError(
            f"{folder}: is broken: it computes NaN or infinity, and its source does not; convert the source again"
        )
    error = float((actual - expected).norm() / expected.norm().clamp_min(torch.finfo(torch.float32).tiny))
    if error > _BROKEN:
        raise ArtifactError(
            f"{folder}: is broken: its outputs differ from its source's by {error:.0%}; convert the source again"
        )
    result = Check(tokens=ids.shape[1], error=error)
    if are_logits:
        log_p, log_q = expected.log_softmax(-1), actual.log_softmax(-1)
        kl = float((log_p.exp() * (log_p - log_q)).sum(-1).mean())
        top1 = float((expected.argmax(-1) == actual.argmax(-1)).double().mean())
        result = replace(result, kl=max(kl, 0.0), top1=top1)
    if model_dtype(artifact.config, artifact.tensors.values()) == "F16":
        result = replace(result, overflow=next((name for name, peak in peaks.items() if peak > FLOAT16_MAX), None))
    return result


def _output(model: Any, ids: Tensor) -> tuple[Tensor, bool]:
    """The output float32 for ids [1, T], and whether it is logits: logits [T, V], or the last hidden state [T, K]."""
    given = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    with torch.inference_mode():
        output = model(input_ids=ids, **given)
    logits = getattr(output, "logits", None)
    value: Tensor = output[0] if logits is None else logits
    return value[0].float(), logits is not None


def _ids(source: Checkpoint, model: Any) -> Tensor:
    """The first tokens of the text in this package as ids [1, T]; without a tokenizer, random ids of the vocabulary."""
    settings = model.config.get_text_config()
    count = min(TOKENS, getattr(settings, "max_position_embeddings", None) or TOKENS)
    vocabulary = model.get_input_embeddings().weight.shape[0]
    try:
        with quiet():
            tokenizer = find_tokenizer(source)
    except DependencyError:
        tokenizer = None
    if tokenizer is not None:
        text = TEXT.read_text(encoding="utf-8")[: 16 * count]
        ids: Tensor = tokenizer(text, return_tensors="pt", truncation=True, max_length=count)["input_ids"]
        # a tokenizer for which most words are unknown repeats one token
        if 4 * len(ids.unique()) > ids.numel() and int(ids.max()) < vocabulary:
            return ids
    return torch.randint(0, vocabulary, (1, count), generator=torch.Generator().manual_seed(0))


@contextmanager
def _watched(model: Any) -> Iterator[dict[str, float]]:
    """Record the largest magnitude in the outputs of each leaf module, by module name."""
    peaks: dict[str, float] = {}

    def note(name: str, output: Any) -> None:
        if isinstance(output, Tensor) and output.is_floating_point() and output.numel():
            peak = float(output.abs().max())
            peaks[name] = max(peaks.get(name, 0.0), math.inf if math.isnan(peak) else peak)

    leaves = [(name, module) for name, module in model.named_modules() if not any(True for _ in module.children())]
    hooks = [
        module.register_forward_hook(lambda _m, _i, output, name=name: note(name, output)) for name, module in leaves
    ]
    try:
        yield peaks
    finally:
        for hook in hooks:
            hook.remove()
