"""The Python examples of docs/transformers.md, run as they are written on a local model."""

import pytest
import torch
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
