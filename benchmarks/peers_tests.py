"""The 8-bit tests of bitsandbytes, PEFT and transformers, run once with bitsandbytes and once with quantize8 instead.

    pip install datasets parameterized
    python -m benchmarks.peers_tests --bitsandbytes DIR --peft DIR --transformers DIR

DIR is a checkout of the project, of the version that is installed. Its tests are copied to a temporary folder and run
unchanged. This module is a pytest plugin that changes the following while they run:

- Models and texts of the hub are replaced by small random ones of the same kind.
- Tests that ask for an accelerator run on the CPU, in float32 if they ask for float16 mixed precision.
- In the second run, bitsandbytes' layer and product are quantize8's, and so is the class of the weight in the tests of
  transformers, which check it.
- Where tests of transformers expect a certain text or memory saving of a model, the expected value is what bitsandbytes
  gives for the small model.

Tests of 4 bits, of other quantizers and of several devices are left out. QUANTIZE8_PEERS_LOG=PREFIX saves the output of
pytest.
"""

from __future__ import annotations

import argparse
import functools
import inspect
import os
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import bitsandbytes
import pytest
import torch
from torch import Tensor, nn

import quantize8
from quantize8.kernels.operator import linear
from quantize8.runtime.bitsandbytes import Int8Params
from quantize8.runtime.bitsandbytes import Linear8bitLt as Int8Layer
from quantize8.runtime.linear import quantize
from quantize8.runtime.training import _Int8Product

WITH = "QUANTIZE8_PEERS_WITH"
FOLDER = "QUANTIZE8_PEERS_MODELS"
SUITES = {
    "bitsandbytes": ["test_linear8bitlt.py", "test_modules.py", "test_autograd.py"],
    "peft": ["test_common_gpu.py", "test_gpu_examples.py"],
    "transformers": ["quantization/bnb/test_mixed_int8.py"],
}
SIZES = {"vocab_size": 128, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}
WORDS = "the of and to in is you that it he was for on are as with his they I at be this have from or one had by word"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for suite in SUITES:
        parser.add_argument(f"--{suite}", type=Path, help=f"a checkout of {suite}")
    given = vars(parser.parse_args())
    for suite, files in SUITES.items():
        if given[suite] is not None:
            results = {name: run(given[suite], files, name) for name in ("bitsandbytes", "quantize8")}
            print("\n".join(compared(suite, results)), flush=True)


def run(checkout: Path, files: Iterable[str], implementation: str) -> dict[str, str]:
    """Name of each test -> passed, failed or skipped."""
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(checkout / "tests", Path(folder) / "tests")
        (Path(folder) / "tests" / "__init__.py").touch()
        report = Path(folder) / "report.xml"
        root = str(Path(__file__).parent.parent)
        settings = {WITH: implementation, FOLDER: f"{folder}/models", "RUN_SLOW": "1", "HF_HUB_OFFLINE": "1"}
        settings |= {"PYTHONPATH": os.pathsep.join([root, folder, os.environ.get("PYTHONPATH", "")])}
        command = [sys.executable, "-m", "pytest", "-q", "-p", "benchmarks.peers_tests", "-p", "no:cacheprovider"]
        command += ["-o", "addopts=", "--timeout=600", f"--junitxml={report}", *(f"tests/{file}" for file in files)]
        done = subprocess.run(command, cwd=folder, env={**os.environ, **settings}, capture_output=True, text=True)
        if not report.exists():
            sys.exit(f"{checkout}: pytest did not run\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
        if log := os.environ.get("QUANTIZE8_PEERS_LOG"):
            Path(f"{log}-{checkout.name}-{implementation}").write_text(done.stdout)
        return outcomes(report)


def outcomes(report: Path) -> dict[str, str]:
    found = {}
    for case in ElementTree.parse(report).iter("testcase"):
        kinds = {child.tag for child in case} & {"failure", "error", "skipped"}
        name = f"{case.get('classname', '').rpartition('.')[2]}::{case.get('name')}"
        found[name] = "skipped" if kinds == {"skipped"} else "failed" if kinds else "passed"
    return found


def compared(suite: str, results: dict[str, dict[str, str]]) -> list[str]:
    """Counts as table rows, and the tests whose outcome differs."""
    lines = []
    for name, found in results.items():
        counts = Counter(found.values())
        numbers = " | ".join(str(counts[kind]) for kind in ("passed", "failed", "skipped"))
        lines.append(f"| {suite} | {name} | {numbers} |")
    theirs, ours = results.values()
    differ = [name for name in theirs if theirs[name] != ours.get(name)]
    return lines + [f"  {name}: {theirs[name]} with bitsandbytes, {ours.get(name)} with quantize8" for name in differ]


# From here on: the pytest plugin, which runs in the test processes.


def pytest_configure() -> None:
    """Patch what the tests import, before they import it."""
    if WITH not in os.environ:
        return
    import transformers

    for name in ("AutoConfig", "AutoTokenizer", "AutoProcessor", "AutoImageProcessor"):
        _local(getattr(transformers, name))
    _local(transformers.PreTrainedModel)
    _local(transformers.models.auto.auto_factory._BaseAutoModelClass)
    for name in ("TrainingArguments", "Seq2SeqTrainingArguments"):
        _on_cpu(getattr(transformers, name))
    nn.Module.cuda = lambda self, *_: self  # type: ignore[method-assign, assignment]
    try:
        import datasets
    except ImportError:
        pass
    else:
        datasets.load_dataset = lambda *_, **__: quotes()
    _with_adapters()
    skip = pytest.skip
    pytest.skip = lambda reason="", **given: None if "got CPU only" in reason else skip(reason, **given)
    if os.environ[WITH] == "quantize8" and Path("tests/test_linear8bitlt.py").exists():
        use_layer()


def pytest_collection_finish(session: Any) -> None:
    """Ask bitsandbytes what tests should expect of small models, then let quantize8 load models."""
    if WITH not in os.environ:
        return
    for kind in {item.cls for item in session.items if hasattr(item.cls, "EXPECTED_OUTPUTS")}:
        kind.EXPECTED_OUTPUTS, kind.EXPECTED_RELATIVE_DIFFERENCE = expected(small_model(kind.model_name))
    if os.environ[WITH] == "quantize8":
        quantize8.enable()
        if Path("tests/quantization").exists():  # PEFT's tests need it unchanged
            bitsandbytes.nn.Int8Params = Int8Params


def pytest_collection_modifyitems(config: Any, items: list[Any]) -> None:
    """Deselect tests that are not about 8 bits, and run those that would ask for one accelerator."""
    if WITH not in os.environ:
        return
    kept = [item for item in items if _is_8bit(item)]
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = kept
    for item in kept:
        for node in item.listchain():
            node.own_markers[:] = [mark for mark in node.own_markers if not _asks_for_accelerator(mark)]


def _asks_for_accelerator(mark: Any) -> bool:
    reason = str(mark.kwargs.get("reason", ""))
    return mark.name == "skipif" and reason in ("test requires a hardware accelerator", "test requires GPU")


def _is_8bit(item: Any) -> bool:
    name, code = item.nodeid.lower(), _source(item.function)
    if any(word in name for word in ("4bit", "fp4", "nf4", "embedding", "gptq", "multi_gpu")):
        return False
    owner = "" if item.cls is None else _source(item.cls)
    words = ("load_in_8bit", "linear8bit", "int8params", "matmullt", "mixed_int8", "test_8bit")
    is_int8 = any(word in name + code for word in words)
    return is_int8 or ("load_in_8bit" in owner and "fixture" in owner and "bnb" in code)


def _source(made: Any) -> str:
    try:
        return inspect.getsource(made).lower()
    except (OSError, TypeError):  # generated by a decorator
        return ""


def _local(kind: Any) -> None:
    """Let `kind.from_pretrained` open a small model in place of a hub model."""
    original = kind.from_pretrained.__func__

    @functools.wraps(original)
    def from_pretrained(cls: Any, name: Any = None, *args: Any, **options: Any) -> Any:
        if name is not None and not Path(str(name)).exists():
            name, options = str(small_model(str(name))), {key: options[key] for key in options if key != "revision"}
        if isinstance(placed := options.get("device_map"), dict):
            options["device_map"] = dict.fromkeys(placed, "cpu")
        return original(cls, name, *args, **options)

    kind.from_pretrained = classmethod(from_pretrained)


def _with_adapters() -> None:
    """Let PEFT load a small LoRA in place of one on the hub."""
    import peft

    def mapped(original: Any, place: int) -> Any:
        @functools.wraps(original)
        def load(*args: Any, **options: Any) -> Any:
            name = str(args[place])
            folder = name if Path(name).exists() else str(small_adapter())
            return original(*args[:place], folder, *args[place + 1 :], **options)

        return load

    peft.PeftModel.from_pretrained = classmethod(mapped(peft.PeftModel.from_pretrained.__func__, 2))
    peft.PeftModel.load_adapter = mapped(peft.PeftModel.load_adapter, 1)


def small_adapter() -> Path:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    folder = Path(os.environ[FOLDER]) / "lora"
    if not folder.exists():
        model = AutoModelForCausalLM.from_pretrained(small_model("opt"))
        get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"])).save_pretrained(folder)
    return folder


def _on_cpu(kind: Any) -> None:
    original = kind.__init__

    @functools.wraps(original)
    def init(self: Any, *args: Any, **options: Any) -> None:
        options |= {"fp16": False, "use_cpu": True, "report_to": [], "dataloader_pin_memory": False}
        original(self, *args, **options)

    kind.__init__ = init


def small_model(name: str) -> Path:
    """A random model of the kind that a hub name stands for, with a word tokenizer."""
    kinds = {"whisper": whisper, "t5": t5, "bloom": bloom, "gpt2": gpt2, "roberta": roberta, "blip2": blip2}
    kinds |= {"opt": opt, "qwen": qwen2}
    make = next((made for part, made in kinds.items() if part in name.lower()), llama)
    folder = Path(os.environ[FOLDER]) / make.__name__
    if not folder.exists():
        torch.manual_seed(0)
        make().save_pretrained(folder)
        write_tokenizer(folder)
    stored = int8_folder(folder)
    return stored if "8bit" in name and stored.exists() else folder


def int8_folder(folder: Path) -> Path:
    """Where the model of `folder` is, as saved by bitsandbytes."""
    return folder.with_name(f"{folder.name}-8bit")


@functools.cache
def expected(folder: Path) -> tuple[set[str], float]:
    """The texts that bitsandbytes generates, int8 and dequantized, and how much smaller than float16 it is."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    load = functools.partial(AutoModelForCausalLM.from_pretrained, folder)
    int8 = {"quantization_config": BitsAndBytesConfig(load_in_8bit=True)}
    half, plain = load(dtype=torch.float16, **int8), load(**int8)
    ratio = load(dtype=torch.float16).get_memory_footprint() / half.get_memory_footprint()
    half.save_pretrained(int8_folder(folder))
    texts = {generated(folder, half), generated(folder, plain)}
    plain.dequantize()
    return texts | {generated(folder, plain)}, ratio


def generated(folder: Path, model: Any) -> str:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokens = model.generate(**tokenizer("Hello my name is", return_tensors="pt"), max_new_tokens=10)
    return str(tokenizer.decode(tokens[0], skip_special_tokens=True))


def opt() -> Any:
    from transformers import OPTConfig, OPTForCausalLM

    sizes = {"hidden_size": 64, "word_embed_proj_dim": 64, "ffn_dim": 128, "num_attention_heads": 4}
    return OPTForCausalLM(OPTConfig(**SIZES, **sizes, num_hidden_layers=4, max_position_embeddings=256, init_std=0.2))


def t5() -> Any:
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}
    return T5ForConditionalGeneration(T5Config(**SIZES, **sizes, feed_forward_proj="gated-gelu"))


def whisper() -> Any:
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    layers = {f"{part}_{kind}": 2 for part in ("encoder", "decoder") for kind in ("layers", "attention_heads")}
    sizes = {"d_model": 64, "encoder_ffn_dim": 128, "decoder_ffn_dim": 128, "num_mel_bins": 16}
    lengths = {"max_source_positions": 30, "max_target_positions": 64, "decoder_start_token_id": 0}
    return WhisperForConditionalGeneration(WhisperConfig(**SIZES, **layers, **sizes, **lengths))


def bloom() -> Any:
    from transformers import BloomConfig, BloomForCausalLM

    return BloomForCausalLM(BloomConfig(**SIZES, hidden_size=64, n_layer=2, n_head=4, initializer_range=0.2))


def gpt2() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64}
    return GPT2LMHeadModel(GPT2Config(**SIZES, **sizes, initializer_range=0.2))


def roberta() -> Any:
    from transformers import RobertaConfig, RobertaForSequenceClassification

    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    return RobertaForSequenceClassification(RobertaConfig(**SIZES, **sizes))


def blip2() -> Any:
    from transformers import Blip2Config, Blip2ForConditionalGeneration

    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    vision = {**sizes, "image_size": 32, "patch_size": 16}
    former = {**sizes, "vocab_size": 128, "encoder_hidden_size": 64}
    parts = {"vision_config": vision, "qformer_config": former, "text_config": opt().config.to_dict()}
    return Blip2ForConditionalGeneration(Blip2Config(**parts, num_query_tokens=4))


def qwen2() -> Any:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    return Qwen2ForCausalLM(Qwen2Config(**SIZES, **decoder_sizes()))


def llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**SIZES, **decoder_sizes()))


def decoder_sizes() -> dict[str, int]:
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4}
    return {**sizes, "num_attention_heads": 4, "num_key_value_heads": 2}


def write_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(["<s>", "<pad>", "</s>", "<unk>", *WORDS.split()])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    special = {"pad_token": "<pad>", "eos_token": "</s>", "bos_token": "<s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)


def quotes() -> Any:
    """A text in place of a data set of quotations."""
    from datasets import Dataset, DatasetDict

    words = WORDS.split()
    return DatasetDict({"train": Dataset.from_dict({"quote": [" ".join(words[i : i + 8]) for i in range(20)]})})


def use_layer() -> None:
    """Put quantize8's product and layer under bitsandbytes' names, for tests of the layer itself."""
    from bitsandbytes.nn import modules

    bitsandbytes.nn.Linear8bitLt = modules.Linear8bitLt = Linear8bitLt
    bitsandbytes.matmul = matmul


def matmul(A: Tensor, B: Tensor, out: Any = None, state: Any = None, threshold: float = 0.0, bias: Any = None) -> Any:
    """bitsandbytes.matmul, computed by quantize8's operators."""
    flat = A.reshape(-1, A.shape[-1])
    if state.has_fp16_weights or state.CB is None:
        weight = B if B.shape[-1] == A.shape[-1] else B.t()
        state.CB, state.SCB = quantize(weight.detach())
        product = _Int8Product.apply(flat, weight, bias, state.CB, state.SCB, state.threshold, "bitsandbytes")
    else:
        product = linear(flat, state.CB, state.SCB, bias, state.threshold, "bitsandbytes")
    return product.view(*A.shape[:-1], state.CB.shape[0])


class Linear8bitLt(Int8Layer):
    """quantize8's layer, created like bitsandbytes': its weight is quantized when the module is moved."""

    def __init__(
        self,
        input_features: int,
        output_features: int,
        bias: bool = True,
        has_fp16_weights: bool = True,
        threshold: float = 0.0,
        index: Any = None,
        device: Any = None,
    ) -> None:
        super().__init__(input_features, output_features, bias, threshold, "bitsandbytes", device)
        plain = nn.Linear(input_features, output_features, bias, device)
        plain.weight.requires_grad_(has_fp16_weights)
        self._has_fp16_weights, self.bias = has_fp16_weights, plain.bias
        self._parameters["weight"] = plain.weight

    @property
    def state(self) -> Any:
        state = super().state
        state.has_fp16_weights = self._has_fp16_weights
        return state

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight" and isinstance(value, bitsandbytes.nn.Int8Params) and value.dtype.is_floating_point:
            value = nn.Parameter(value.data, requires_grad=value.requires_grad)
        super().__setattr__(name, value)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        nn.Module._apply(self, fn, recurse)
        self._quantize()
        return self

    def _quantize(self) -> None:
        weight = self._parameters["weight"]
        if not self._has_fp16_weights and weight.dtype.is_floating_point:
            codes, absmax = quantize(weight.detach())
            self._parameters["weight"] = nn.Parameter(codes, requires_grad=False)
            self.SCB.data = absmax

    def forward(self, x: Tensor) -> Tensor:
        if self._has_fp16_weights:
            return matmul(x, self.weight, state=bitsandbytes.MatmulLtState(), bias=self.bias)
        self._quantize()
        return super().forward(x)


if __name__ == "__main__":
    main()
