"""One tiny model through every conversion and loader: what became int8, what did not and why, and how far outputs are.

A trial is a row of the results of `architectures`, of plain JSON values.
"""

from __future__ import annotations

import gc
import inspect
import math
import re
import shutil
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from benchmarks.architectures_models import Subject, build, features, inputs
from quantize8 import Quantize8Error, convert, load
from quantize8.conversion.plan import Plan
from quantize8.runtime.loading import quiet
from quantize8.sources.base import FLOATING
from quantize8.sources.structure import EXPERT, structure_of

TARGETS: dict[str, dict[str, str]] = {
    "bitsandbytes": {"format": "bitsandbytes"},
    "w8a8": {"format": "compressed-tensors", "moe": "transformers"},
    "w8a16": {"format": "compressed-tensors", "scheme": "w8a16", "moe": "transformers"},
    "w8a8, moe vllm": {"format": "compressed-tensors"},
}
EXPERTS_ALONE = "w8a8, moe vllm"  # for models with experts; transformers cannot open it
EXPLAINED = ("bitsandbytes", "w8a8")  # of which the results say what stays in floating point
SAME = 1e-4  # float32 rounding in another order
BOUND = 0.1  # of the relative error: a few layers of int8 give 0.01 to 0.03
SPREAD = 2.0  # times the error that the same rounding gives without a loader
TYPICAL = 0.05  # of the median over positions: a router that decides otherwise at some of them is no wrong weight
LARGE = 0.01  # the share of the weights above which a float tensor is named
NAMES = 3  # of these tensors, for each reason

Outputs = dict[str, Tensor]


@dataclass
class Case:
    """A saved model with the inputs that it takes and its outputs for them."""

    kind: Any
    source: Path
    given: dict[str, Tensor]
    towers: dict[str, dict[str, Tensor]]
    truth: Outputs

    def outputs(self, model: Any) -> Outputs:
        """The outputs of a model, by the name of the method that computes them."""
        found = {"forward": _tensor(_call(model, self.given))}
        for name, given in self.towers.items():
            found[name] = _tensor(_call(getattr(_owner(model, name), name), given))
        return found

    def open(self, folder: Path, **given: Any) -> Any:
        """Open a folder with transformers' own loader."""
        model, notes = self.kind.from_pretrained(folder, device_map="cpu", output_loading_info=True, **given)
        keys = [str(key) for part in ("missing_keys", "mismatched_keys") for key in notes[part]]
        if keys:
            raise ValueError(f"missing keys: {', '.join(sorted(keys)[:3])}")
        return model.eval()


def trial(subject: Subject, work: Path) -> dict[str, Any]:
    """The row of a model type. Works in a folder, which it removes."""
    start = time.perf_counter()
    row: dict[str, Any] = {"model_type": subject.model_type, "class": subject.class_name, "kind": subject.kind}
    with _silent():
        try:
            model = build(subject)
        except Exception as error:  # any error of transformers is a result, here and below
            return row | {"verdict": "not built", "reason": _reason(error)}
        row["parameters"] = sum(value.numel() for value in model.parameters())
        try:
            case = _case(model, work / "source")
        except Exception as error:
            return row | {"verdict": "not run", "reason": _reason(error)}
        row |= {"inputs": sorted(case.given), "towers": sorted(case.towers)}
        row["targets"] = {}
        for target, options in TARGETS.items():
            if target != EXPERTS_ALONE or any(_has_experts(each) for each in model.modules()):
                row["targets"][target] = _target(case, target, options, work / target.replace(", ", "-"))
                gc.collect()
    shutil.rmtree(work)
    return row | {"verdict": overall(row), "seconds": round(time.perf_counter() - start, 1)}


ORDER = ("FAILS", "WRONG", "FAULT", "refused", "ok")


def overall(row: dict[str, Any]) -> str:
    """The worst verdict of a row's targets and loaders."""
    found = {
        cell["verdict"] for target in row["targets"].values() for cell in (target, *target.get("loaders", {}).values())
    }
    return next(verdict for verdict in ORDER if verdict in found)


def _has_experts(module: nn.Module) -> bool:
    return any(value.dim() == 3 and "expert" in type(module).__name__.lower() for value in module.parameters(False))


def _case(model: Any, folder: Path) -> Case:
    """Save a model and open it again; the outputs of both are the same, or transformers is at fault."""
    given, failure = None, None
    for each in inputs(model):
        try:
            first = _tensor(_call(model, each))
        except Exception as error:
            failure = failure or error
            continue
        if first.isfinite().all() and first.numel() > 1:
            given = each
            break
        failure = failure or ValueError("its outputs are not finite")
    if given is None:
        raise failure or ValueError("no input is known for it")
    case = Case(type(model), folder, given, _towers(model), {})
    expected = case.outputs(model)
    model.save_pretrained(folder)
    again = case.open(folder, dtype=torch.float32)
    case.truth = case.outputs(again)
    if (worst := max(_apart(case.truth[name], expected[name]) for name in expected)) > SAME:
        raise ValueError(f"transformers does not open what it saved: outputs {worst:.2g} apart")
    return case


_TOWERS = {"get_image_features": "pixel_values", "get_audio_features": "input_features"}


def _towers(model: Any) -> dict[str, dict[str, Tensor]]:
    """Methods of a multimodal model that run an encoder -> inputs that they take."""
    found = {}
    for name in _TOWERS:
        owner = _owner(model, name)
        if owner is None:
            continue
        for given in features(model.config, inspect.signature(getattr(owner, name)).parameters):
            try:
                value = _tensor(_call(getattr(owner, name), given))
            except Exception:  # another input may do
                continue
            if value.isfinite().all():
                found[name] = given
                break
    return found


def _owner(model: Any, method: str) -> Any:
    inner = getattr(model, "model", None)
    return next((each for each in (model, inner) if each is not None and hasattr(each, method)), None)


def _target(case: Case, target: str, options: dict[str, str], out: Path) -> dict[str, Any]:
    """Convert, and open in both loaders."""
    try:
        plan = convert(str(case.source), out, workers=1, **options).plan
    except Quantize8Error as error:
        return {"verdict": "refused", "reason": _reason(error)}
    except Exception as error:
        return {"verdict": "FAILS", "reason": _reason(error)}
    cell: dict[str, Any] = {"verdict": "ok", "int8": round(plan.int8_weights / plan.weights, 4)}
    if target in EXPLAINED:
        cell["float"] = kept_of(plan)
    loaders: dict[str, Callable[[], Any]] = {"load": lambda: load(out, "cpu", dtype=torch.float32)[0]}
    if target != EXPERTS_ALONE:
        loaders = {"transformers": lambda: case.open(out, dtype="auto"), **loaders}
    cell["loaders"] = {name: _loader(case, target, plan, out, name, opener) for name, opener in loaders.items()}
    shutil.rmtree(out)
    return cell


def kept_of(plan: Plan) -> list[dict[str, Any]]:
    """The float tensors with more than LARGE of the weights, by the reason that the plan gives, with some names.

    Tensors whose names differ only in numbers count as one.
    """
    found: dict[str, dict[str, float]] = {}
    for info in plan.checkpoint.tensors.values():
        if info.dtype in FLOATING and info.name.removesuffix(".weight") not in plan.modules:
            name, shares = re.sub(r"\d+", "*", info.name), found.setdefault(reason_of(plan, info.name), {})
            shares[name] = shares.get(name, 0.0) + math.prod(info.shape) / plan.weights
    return [
        {
            "reason": reason,
            "share": round(sum(large.values()), 4),
            "tensors": sorted(large, key=large.__getitem__)[-NAMES:],
        }
        for reason, shares in found.items()
        if (large := {name: share for name, share in shares.items() if share > LARGE})
    ]


def reason_of(plan: Plan, tensor: str) -> str:
    """Why the plan says that a tensor stays in float."""
    return plan.kept.get(tensor) or plan.kept.get(tensor.removesuffix(".weight")) or "UNSAID"


def _loader(case: Case, target: str, plan: Plan, out: Path, name: str, opener: Callable[[], Any]) -> dict[str, Any]:
    try:
        model = opener()
        found = case.outputs(model)
        del model
    except Exception as error:
        reason = _reason(error)
        if name == "transformers" and (same := without_us(case, target, plan)):
            return {"verdict": "FAULT", "reason": reason, "without quantize8": same}
        return {"verdict": "FAILS", "reason": reason}
    errors = {name: _apart(found[name], value) for name, value in case.truth.items()}
    cell: dict[str, Any] = {"verdict": "ok", "errors": {name: _rounded(value) for name, value in errors.items()}}
    if any(not value <= BOUND for value in errors.values()):
        bounds = expected(case, plan, out)
        cell["expected"] = {name: _rounded(value) for name, value in bounds.items()}
        typical = {name: _typical(found[name], value) for name, value in case.truth.items()}
        cell["typical"] = {name: _rounded(value) for name, value in typical.items()}
        within = {name: value <= max(BOUND, SPREAD * bounds[name]) for name, value in errors.items()}
        if not all(fine or typical[name] <= TYPICAL for name, fine in within.items()):
            cell["verdict"] = "WRONG"
    return cell


def expected(case: Case, plan: Plan, out: Path) -> dict[str, float]:
    """The error of the artifact's weights in plain float, with the inputs of its int8 layers rounded to int8."""
    plain = out.with_name("plain")
    try:
        convert(str(out), plain, workers=1, format="float32")
        model = case.open(plain, dtype=torch.float32)
        for name in layers_of(plan):
            model.get_submodule(name).register_forward_pre_hook(_round_inputs)
        found = case.outputs(model)
    except Exception:
        return dict.fromkeys(case.truth, 0.0)
    finally:
        shutil.rmtree(plain, ignore_errors=True)
    return {name: _apart(found[name], value) for name, value in case.truth.items()}


def layers_of(plan: Plan) -> list[str]:
    """The int8 layers, by their names in the model; without experts, which are not modules there."""
    names = structure_of(plan.checkpoint).model_names
    return [names.get(name, name) for name, kind in plan.modules.items() if kind != EXPERT]


def _round_inputs(_: Any, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    values, *rest = given
    step = values.abs().amax(-1, keepdim=True).clamp(min=1e-30) / 127
    return (values / step).round() * step, *rest


def without_us(case: Case, target: str, plan: Plan) -> str:
    """The error of transformers' own quantization of the float source with the same layers; empty if it works."""
    try:
        if target == "bitsandbytes":
            _bitsandbytes(case, plan)
        else:
            _compressed(case, target, plan)
    except Exception as error:
        return _reason(error)
    return ""


def _bitsandbytes(case: Case, plan: Plan) -> None:
    """Quantize while loading, save, and open again."""
    config = transformers.BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=plan.skip_list or None)
    model = case.open(case.source, dtype="auto", quantization_config=config)
    case.outputs(model)
    _reopened(case, model)


def _compressed(case: Case, target: str, plan: Plan) -> None:
    """Compress with compressed-tensors itself, save, and open again."""
    from compressed_tensors import ModelCompressor
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config

    entry = plan.format.edit_config({}, plan)["quantization_config"] | {"quantization_status": "frozen"}
    model = case.open(case.source, dtype=torch.float32)
    apply_quantization_config(model, QuantizationConfig.model_validate(entry))
    for module in model.modules():
        if hasattr(module, "weight_scale"):
            absmax = module.weight.abs().amax(1, keepdim=True).clamp(min=1e-30)
            module.weight_scale.data = (absmax / 127).to(module.weight_scale.dtype)
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    _reopened(case, model, compressor.update_config)


def _reopened(case: Case, model: Any, finish: Callable[[Path], Any] = lambda folder: None) -> None:
    folder = case.source.with_name("without")
    try:
        model.save_pretrained(folder)
        finish(folder)
        case.outputs(case.open(folder, dtype="auto"))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _call(function: Any, given: dict[str, Tensor]) -> Any:
    torch.manual_seed(5)
    with torch.inference_mode():
        return function(**{name: value.clone() for name, value in given.items()})


def _tensor(found: Any) -> Tensor:
    """The main output: logits, the last hidden state, or the first that is a floating-point tensor."""
    for name in ("logits", "last_hidden_state", "pooler_output"):
        value = getattr(found, name, None)
        if isinstance(value, Tensor):
            return value.double()
    tensors = [each.double().flatten() for each in _flat(found) if each.is_floating_point()]
    if not tensors:
        raise ValueError("it has no floating-point outputs")
    return torch.cat(tensors)


def _flat(found: Any) -> Iterator[Tensor]:
    if isinstance(found, Tensor):
        yield found
    elif isinstance(found, dict):
        yield from (each for value in found.values() for each in _flat(value))
    elif isinstance(found, list | tuple):
        yield from (each for value in found for each in _flat(value))


def _apart(got: Tensor, truth: Tensor) -> float:
    """Norm of the difference over the norm of what was expected; infinity for another shape or NaN."""
    if got.shape != truth.shape:
        return math.inf
    same = got == truth  # infinities, too
    difference = torch.where(same, 0.0, got - truth)
    value = float(difference.norm() / truth[truth.isfinite()].norm().clamp(min=1e-30))
    return value if math.isfinite(value) else math.inf


def _typical(got: Tensor, truth: Tensor) -> float:
    """As `_apart`, but the median over all positions."""
    if got.shape != truth.shape or truth.dim() < 2:
        return math.inf
    errors = (got - truth).norm(dim=-1) / truth.norm(dim=-1).clamp(min=1e-30)
    value = float(errors.median())
    return value if math.isfinite(value) else math.inf


def _rounded(value: float) -> float | str:
    return "infinite" if math.isinf(value) else float(f"{value:.2g}")


def _reason(error: Exception) -> str:
    """The first lines of an error, without the file name at the start of quantize8's."""
    lines = [line.strip() for line in str(error).strip().splitlines() if line.strip()] or [""]
    text = " ".join(lines[:2])[:300]
    return text.partition(": ")[2] if isinstance(error, Quantize8Error) else f"{type(error).__name__}: {text}"


@contextmanager
def _silent() -> Iterator[None]:
    with quiet(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
