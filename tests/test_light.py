"""An installation without torch, transformers and accelerate: what converts with the same bytes, and what says why not.

`light.py` is the command line in a process that finds none of the three packages.
"""

import json
import os
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import light
from helpers.adapters import train
from helpers.making import llama
from test_digests import CASES, DIGESTS, digest, sources

import quantize8
from quantize8 import DependencyError, convert, optional
from quantize8.commands import convert as operation
from quantize8.kernels import devices as choice

try:
    import tomllib
except ImportError:  # Python 3.10
    import tomli as tomllib

ROOT = Path(quantize8.__file__).parent.parent
COMMAND = "pip install 'quantize8[run]'"
# What a plain decoder in safetensors can become
LIGHT = [
    "llama bitsandbytes",
    "llama bitsandbytes, small files",
    "llama bitsandbytes, mse",
    "llama compressed-tensors w8a8",
    "llama compressed-tensors w8a16",
    "llama bfloat16",
    "int8 compressed-tensors w8a8",
    "int8 float32",
]
# Modules that compute on torch tensors, and none that a conversion on the CPU imports
NEED_TORCH = {
    *(f"calibration.{name}" for name in ("activations", "calibrate", "columns", "expected", "experts", "rounding")),
    *(f"runtime.{name}" for name in ("bitsandbytes", "cache", "check", "config", "experts", "linear", "quantizer")),
    *(f"runtime.{name}" for name in ("double", "state", "streaming", "training", "weight")),
    *(f"kernels.{name}" for name in ("gpu", "operator", "packed", "stream")),
}


def run(*command: object) -> tuple[int, str, str]:
    """The exit code, stdout and stderr of a Python process of the package's checkout."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "200"}
    words = [sys.executable, *map(str, command)]
    done = subprocess.run(words, capture_output=True, text=True, env=environment, encoding="utf-8")
    return done.returncode, done.stdout, done.stderr


def quantize8_without_run(*arguments: object) -> tuple[int, str, str]:
    return run(light.__file__, *arguments)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, minilm: Path) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("light")
    found = sources(root, minilm)
    (root / "text").write_text("w1 w2 w3")
    pickled = root / "bin"
    pickled.mkdir()
    (pickled / "config.json").write_bytes((found["llama"] / "config.json").read_bytes())
    torch.save({"model.norm.weight": torch.ones(2)}, pickled / "pytorch_model.bin")
    return found | {"text": root / "text", "bin": pickled}


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # PEFT's name
def test_an_adapter_is_merged_without_torch(tmp_path):
    source = llama(tmp_path / "source")
    adapter = train(source, tmp_path / "adapter", target_modules=["q_proj", "down_proj"], use_dora=True)
    words = ("convert", source, "--adapter", adapter, "--out", tmp_path / "light")
    code, _, err = quantize8_without_run(*words)
    assert (code, err) == (0, "")
    convert(str(source), tmp_path / "whole", adapter=str(adapter))
    assert digest(tmp_path / "light") == digest(tmp_path / "whole")


@pytest.mark.parametrize("case", LIGHT)
def test_an_artifact_has_the_same_bytes_without_torch(case, made, tmp_path):
    source, options = CASES[case]
    words = [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", value)]
    code, text, err = quantize8_without_run("convert", made[source], "--out", tmp_path / "artifact", *words)
    assert (code, err) == (0, "") and "artifact" in text
    assert digest(tmp_path / "artifact") == json.loads(DIGESTS.read_text())[case]
    code, text, err = quantize8_without_run("verify", tmp_path / "artifact")
    assert (code, err) == (0, "") and "all good" in text


def test_other_commands_work_without_torch(made, tmp_path):
    for arguments, expected in (
        (("plan", made["llama"]), "machines"),
        (("inspect", made["llama"]), "model.layers.0.mlp.down_proj"),
        (("inspect", made["int8"]), "model.layers.0.mlp.down_proj"),
        (("inspect", made["gguf"]), "model.layers.0.mlp.down_proj"),
        (("convert", made["llama"], "--out", tmp_path / "int8", "--device", "auto", "--part", "1/1"), "finalize"),
        (("finalize", tmp_path / "int8"), "artifact"),
        (("--help",), "convert"),
    ):
        code, text, err = quantize8_without_run(*arguments)
        assert (code, err) == (0, "") and expected in text, arguments
    code, _, err = quantize8_without_run("push", tmp_path / "nothing", "me/model")
    assert code == 1 and "quantize8.json" in err


def test_env_names_what_is_missing_and_the_command(made):
    code, text, err = quantize8_without_run("env", "--json")
    assert (code, err) == (0, "")
    found = json.loads(text)
    assert [found["versions"][name] for name in light.RUN] == [None] * 3 and found["versions"]["numpy"]
    assert found["cpu"].startswith("int8 by ") and found["gpus"] == []
    (needed,) = (fault for fault, command in found["advice"].items() if command == COMMAND)
    assert all(f"{name}: not installed" in needed for name in light.RUN) and "to run models" in needed


@pytest.mark.parametrize(
    ("arguments", "purpose"),
    [
        (("convert", "mixtral"), "transformers: not installed, needed to find the Linear layers of MixtralForCausalLM"),
        (("convert", "gpt2"), "transformers: not installed, needed to find the Linear layers of GPT2LMHeadModel"),
        (("inspect", "gpt2"), "transformers: not installed, needed to find the Linear layers of GPT2LMHeadModel"),
        (("plan", "minilm"), "transformers: not installed, needed to find the Linear layers of BertModel"),
        (("convert", "llama", "--format=gguf"), "transformers: not installed, needed to write GGUF"),
        (("convert", "gguf"), "transformers: not installed, needed to read the tokenizer of "),
        (("convert", "bin"), "torch: not installed, needed to read "),
        (("convert", "llama", "--calibrate", "text"), "torch: not installed, needed for --calibrate"),
        (("convert", "llama", "--check"), "torch: not installed, needed for --check"),
        (("convert", "llama", "--device", "cuda"), "torch: not installed, needed for --device cuda"),
        (("inspect", "llama", "--text", "text"), "torch: not installed, needed to inspect activations"),
        (("run", "llama"), "torch: not installed, needed to run a model"),
        (("evaluate", "llama"), "torch: not installed, needed to run a model"),
        (("demo",), "torch: not installed, needed for the demo"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_what_needs_the_extra_says_so_in_one_line(arguments, purpose, made, tmp_path):
    words = [made.get(word, word) for word in arguments]
    out = ("--out", tmp_path / "out") if arguments[0] in ("convert", "demo") else ()
    code, text, err = quantize8_without_run(*words, *out)
    assert code == 1 and text == "" and err.count("\n") == 1
    assert err.startswith(f"error: {purpose}") and err.endswith(f": {COMMAND}\n")
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".*"))


def test_modules_and_public_names_without_torch():
    modules = sorted(found.name for found in pkgutil.walk_packages(quantize8.__path__, "quantize8."))
    script = f"""
import importlib, json, light
light.block()
import quantize8
failed = []
for name in {modules!r}:
    if not name.endswith("__main__"):
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            assert error.name.partition(".")[0] in light.RUN, error
            failed.append(name.removeprefix("quantize8."))
messages = {{}}
for name in quantize8.__all__:
    try:
        getattr(quantize8, name)
    except quantize8.DependencyError as error:
        messages[name] = str(error)
print(json.dumps([failed, messages]))
"""
    code, text, err = run("-c", f"import sys; sys.path.insert(0, {str(Path(light.__file__).parent)!r}){script}")
    assert code == 0, err
    failed, messages = json.loads(text)
    assert set(failed) == NEED_TORCH
    assert set(messages) == {"Int8Config", "Int8Linear", "enable", "load", "merge_and_unload"}
    assert messages["load"] == f"torch: not installed, needed for quantize8.load: {COMMAND}"


def test_the_automatic_check_is_left_out_and_the_result_says_so(monkeypatch, tmp_path):
    source = llama(tmp_path / "source")
    monkeypatch.setattr(operation, "_CHECK_SECONDS", -1e9)  # it costs less than converting
    monkeypatch.setattr(optional, "installed", lambda package: None)
    found = convert(str(source), tmp_path / "int8")
    assert found.check.skipped == f"torch: not installed, needed for a check: {COMMAND}"
    assert found.as_json()["check"]["skipped"] == found.check.skipped and found.check.parameters == 0
    with pytest.raises(DependencyError, match="needed for --check"):
        convert(str(source), tmp_path / "checked", check=True)
    assert convert(str(source), tmp_path / "unchecked", check=False).check is None


def test_a_gpu_is_not_used_without_torch(monkeypatch):
    monkeypatch.setattr(choice, "_has_driver", lambda: True)
    monkeypatch.setattr(choice, "installed", lambda package: None)
    assert choice.resolve("auto") == "cpu"


def test_an_older_release_is_told_from_a_missing_package(monkeypatch):
    assert optional.problem("for a test") is None and optional.require("for a test", "torch") is None
    monkeypatch.setattr(optional, "installed", {"torch": "2.8.0+cpu", "transformers": "4.57.1"}.get)
    assert optional.problem("for a test", "torch") is None
    expected = f"transformers: 4.57.1 is older than 5.20, needed for a test: {COMMAND}"
    assert optional.problem("for a test") == expected
    with pytest.raises(DependencyError, match="accelerate: not installed"):
        optional.require("for a test", "accelerate")
    assert optional.fault("torch", "unknown") is None and optional.fault("torch", "2.10.0a0+git1234") is None


def test_a_package_in_a_folder_that_pip_did_not_install_counts(monkeypatch, tmp_path):
    (tmp_path / "a_checkout.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    assert optional.installed("a_checkout") == "unknown" and optional.installed("no_such_package") is None
    monkeypatch.setitem(sys.modules, "no_spec", type(sys)("no_spec"))
    assert optional.installed("no_spec") is None


def test_the_extra_is_no_base_dependency_and_is_in_run_and_all():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]

    def names(requirements: list[str]) -> set[str]:
        found = set()
        for text in requirements:
            if nested := re.fullmatch(r"quantize8\[(.*)\]", text):
                found |= names([one for extra in nested[1].split(",") for one in extras[extra]])
            else:
                found.add(re.match(r"[\w-]+", text)[0])
        return found

    assert not names(project["dependencies"]) & {*light.RUN, "tokenizers", "bitsandbytes", "cupy", "ray"}
    assert names(extras["run"]) == set(light.RUN) == set(optional.RUN) and names(extras["run"]) <= names(extras["all"])
    assert {*extras["run"]} == {f"{name}>={'.'.join(map(str, least))}" for name, least in optional.RUN.items()}


def test_no_requirement_is_written_twice():
    content = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    project, groups = content["project"], content["dependency-groups"]
    lists = [project["dependencies"], *project["optional-dependencies"].values(), *groups.values()]
    written = [text for requirements in lists for text in requirements if isinstance(text, str)]
    assert len(written) == len(set(written))
    assert not project["optional-dependencies"].keys() & groups.keys()
