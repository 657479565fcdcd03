"""Tiny models of other architectures in every loader; the documentation shows what was measured for all."""

import json
import random
from pathlib import Path

import pytest

from benchmarks import architectures, architectures_models, architectures_table, architectures_trial
from benchmarks.architectures_models import settings_of, smaller, subjects
from benchmarks.architectures_trial import trial

pytestmark = [
    pytest.mark.filterwarnings("ignore:MatMul8bitLt"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]

ROOT = Path(__file__).parent.parent
ROWS = json.loads((ROOT / "benchmarks" / "results" / "architectures.json").read_text())["rows"]
SUBJECTS = {subject.model_type: subject for subject in subjects()}
PER_KIND = {"text": 5, "vision-language": 3, "audio-language": 1, "encoder-decoder": 1, "encoder": 2}


def sample():
    """A dozen of the types, chosen once."""
    chosen = random.Random(8)
    for kind, count in PER_KIND.items():
        yield from chosen.sample([row for row in ROWS if row["kind"] == kind and "targets" in row], count)


def verdicts(row):
    """The verdict of each target and loader."""
    return {
        (target, name): each["verdict"]
        for target, cell in row["targets"].items()
        for name, each in [("convert", cell), *cell.get("loaders", {}).items()]
    }


@pytest.mark.parametrize("expected", list(sample()), ids=lambda row: row["model_type"])
def test_a_sample_of_architectures(expected, tmp_path):
    row = trial(SUBJECTS[expected["model_type"]], tmp_path / "work")
    assert verdicts(row) == verdicts(expected)
    assert row["verdict"] == expected["verdict"] and not (tmp_path / "work").exists()


def test_the_documented_tables_are_the_results():
    page = (ROOT / "docs" / "architectures.md").read_text()
    assert architectures_table.filled(page, ROWS) == page
    shown = {row["model_type"] for row in ROWS if "targets" in row}
    assert all(f"| `{name}` |" in page for name in shown) and len(shown) >= 200
    assert {row["model_type"] for row in ROWS} == set(SUBJECTS)
    assert not [row["model_type"] for row in ROWS if row["verdict"] in ("WRONG", "FAILS", "crashed")]


def test_a_wrong_weight_is_called_wrong(tmp_path, monkeypatch):
    """As loaders that take codes for weights would have it."""
    opened = architectures_trial.load

    def damaged(*args, **options):
        model, tokenizer = opened(*args, **options)
        model.model.layers[1].mlp.down_proj.SCB.data *= 2
        return model, tokenizer

    monkeypatch.setattr(architectures_trial, "load", damaged)
    row = trial(SUBJECTS["llama"], tmp_path / "work")
    assert row["verdict"] == "WRONG"
    assert {name for (_, name), verdict in verdicts(row).items() if verdict == "WRONG"} == {"load"}


def test_settings_are_shrunk_by_name():
    assert smaller("hidden_size", 4096) == 64 and smaller("num_attention_heads", 32) == 4
    assert smaller("vocab_size", 100) == 100 and smaller("encoder_ffn_dim", 4096) == 128
    settings = settings_of("qwen3_next")
    assert sorted(set(settings.layer_types)) == ["full_attention", "linear_attention"]
    assert len(settings.layer_types) == settings.num_hidden_layers <= architectures_models.MOST_LAYERS
    assert settings_of("gemma3").image_token_id < 256


def test_a_type_that_ends_the_process_loses_itself_alone(tmp_path, monkeypatch):
    """The worker is replaced by one that writes the first row, and then ends."""
    script = tmp_path / "python"
    row = json.dumps({"model_type": "a", "verdict": "ok"})
    script.write_text(f"#!/bin/sh\necho '{row}' >> {tmp_path}/rows\necho 'no memory' >&2\nexit 3\n")
    script.chmod(0o755)
    monkeypatch.setattr(architectures.sys, "executable", str(script))
    architectures.batch(["a", "b", "c"], tmp_path / "rows")
    rows = architectures.read(tmp_path / "rows")
    assert rows["b"] == {"model_type": "b", "verdict": "crashed", "reason": "no memory"} and "c" not in rows
