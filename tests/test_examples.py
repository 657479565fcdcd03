"""The Python examples of docs/transformers.md and the scripts in examples/, run as they are."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.making import llama, word_tokenizer
from test_docs import ROOT, fenced
from transformers import AutoModelForCausalLM
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

from quantize8 import Int8Linear

pytestmark = pytest.mark.filterwarnings("ignore:MatMul8bitLt")


@pytest.fixture
def folder(smollm2, tmp_path, monkeypatch):
    (tmp_path / "smollm2").symlink_to(smollm2)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(AUTO_QUANTIZER_MAPPING, "bitsandbytes_8bit", AUTO_QUANTIZER_MAPPING["bitsandbytes_8bit"])
    return tmp_path


def test_the_examples_of_the_transformers_page(folder):
    names = {}
    first, second = fenced(ROOT / "docs" / "transformers.md", "python")
    exec(first, names)
    ids = torch.arange(2, 22)[None]
    with torch.inference_mode():
        quantized = names["model"](ids).logits
        theirs = AutoModelForCausalLM.from_pretrained(folder / "smollm2-int8", device_map="cpu").eval()(ids).logits
        exec(second, names)
        enabled = names["model"](ids).logits
    assert torch.equal(quantized, theirs) and torch.equal(enabled, theirs)
    assert any(isinstance(module, Int8Linear) for module in names["model"].modules())


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return str(word_tokenizer(llama(tmp_path_factory.mktemp("tiny") / "source")))


def run_script(name: str, *arguments: str) -> list[str]:
    command = [sys.executable, "-W", "error::UserWarning:quantize8", str(ROOT / "examples" / name), *arguments]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_scripts_convert_and_compare(tiny, tmp_path):
    lines = run_script("convert.py", tiny, str(tmp_path / "out"))
    assert re.fullmatch(r"[\d,]+ bytes of weights became [\d,]+", lines[0])
    assert lines[1].startswith("verified ") and len(lines) == 5
    assert [line.split()[1].startswith("model.layers.") for line in lines[2:]] == [True] * 3
    (tmp_path / "text").write_text("w1 w2 w3 w4 w5 w6 w7 w8 w9 w10 " * 20)
    lines = run_script("compare.py", str(tmp_path / "out"), tiny, str(tmp_path / "text"))
    assert [line.split()[0] for line in lines] == ["perplexity", "KL", "top-1"]


def test_script_generates(tiny):
    first, *text = run_script("generate.py", tiny, "w1 w2 w3")
    assert first.startswith("14 layers in int8, ") and text[0].startswith("w1 w2 w3")


def test_every_script_is_run_here():
    named = set(re.findall(r'run_script\("(\w+\.py)"', Path(__file__).read_text(encoding="utf-8")))
    assert named == {path.name for path in (ROOT / "examples").glob("*.py")}
