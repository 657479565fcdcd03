"""Hostile files through every reader: earlier findings, a short seeded run, and valid files that stay readable."""

import json
import random
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
from helpers.flipping import FORMATS, artifacts, flip
from helpers.fuzzing import CORPUS, READERS, attempt, described, kept
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from quantize8.sources import base
from quantize8.sources.safetensors import SafetensorsCheckpoint

SLOW = {"config-model": 20, "tokenizer": 40, "verify": 150, "torch": 200}  # executions of a seeded run; of others 500
quick = settings(
    max_examples=60, deadline=None, database=None, derandomize=True, phases=[Phase.generate],
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)  # fmt: skip


@pytest.mark.parametrize("name", READERS)
def test_sound_files_are_read(name, tmp_path):
    """Otherwise a reader that refused everything would pass."""
    assert any(attempt(name, seed, tmp_path) is None for seed in READERS[name].seeds())


@pytest.mark.parametrize(("name", "path"), [(name, path) for name in READERS for path in kept(name)], ids=str)
def test_kept_inputs_give_a_result_or_one_line(name, path, tmp_path):
    READERS[name].seeds()
    begun = time.perf_counter()
    attempt(name, path.read_bytes(), tmp_path)
    assert time.perf_counter() - begun < 5


@pytest.mark.parametrize("name", READERS)
def test_a_seeded_run_of_changed_inputs(name, tmp_path):
    reader, rng = READERS[name], random.Random(name)
    pool = [*reader.seeds(), *(path.read_bytes() for path in kept(name))]
    for _ in range(SLOW.get(name, 500)):
        data = reader.mutate(rng.choice(pool), rng)
        if attempt(name, data, tmp_path) is None:
            pool.append(data)


def test_the_corpus_is_small_and_of_known_readers():
    folders = [path for path in CORPUS.iterdir() if path.is_dir()]
    assert {path.name for path in folders} <= set(READERS)
    assert sum(path.stat().st_size for path in CORPUS.rglob("*") if path.is_file()) < 2**20


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
config_keys = st.sampled_from(
    ["architectures", "model_type", "dtype", "text_config", "quantization_config", "vocab_size", "num_hidden_layers"]
)


@quick
@given(config=st.dictionaries(config_keys | st.text(max_size=5), json_values, max_size=6))
def test_any_json_as_config(config, tmp_path):
    config.pop("model_type", None)  # transformers' own code is for the slower runs
    attempt("config", described(config), tmp_path)


@quick
@given(value=json_values)
@pytest.mark.parametrize("name", ["index", "manifest", "verify", "safetensors", "outliers", "gguf", "awq", "fp8"])
def test_any_json_as_a_description(name, value, tmp_path):
    attempt(name, described(value), tmp_path)


@quick
@given(data=st.binary(max_size=300))
@pytest.mark.parametrize("name", ["safetensors", "gguf", "torch", "recipe", "manifest", "index", "config"])
def test_any_bytes(name, data, tmp_path):
    attempt(name, b"\0" + data, tmp_path)


dtypes = st.sampled_from(sorted(base.DTYPES))
shapes = st.lists(st.integers(0, 4), max_size=3)


@quick
@given(tensors=st.dictionaries(st.text("ab.0", min_size=1, max_size=6), st.tuples(dtypes, shapes), max_size=5))
def test_every_sound_safetensors_file_is_read_as_the_library_reads_it(tensors, tmp_path):
    from helpers.fuzzing import safetensors

    path = tmp_path / "model.safetensors"
    path.write_bytes(safetensors({name: [dtype, list(shape)] for name, (dtype, shape) in tensors.items()}))
    checkpoint = SafetensorsCheckpoint(tmp_path, [path.name], {}, "x")
    assert set(checkpoint.tensors) == set(tensors)
    content = path.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    for name, (dtype, shape) in tensors.items():
        begin, end = header[name]["data_offsets"]
        expected = np.frombuffer(content[start + begin : start + end], base.DTYPES[dtype]).reshape(shape)
        rows = checkpoint.rows(name, 0, shape[0] if shape else 1)
        assert rows.shape == tuple(shape) and rows.tobytes() == expected.tobytes()


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> dict[str, Path]:
    return artifacts(tmp_path_factory.mktemp("flips"))


@pytest.mark.parametrize("name", FORMATS)
def test_any_flipped_bit_of_any_file_is_found(name, made, tmp_path):
    artifact = shutil.copytree(made[name], tmp_path / "artifact")
    found = flip(artifact, round(150 * FORMATS[name]))
    assert all(good for _, good in found)
    assert {name for name, _ in found} == {path.name for path in artifact.rglob("*") if path.is_file()}
