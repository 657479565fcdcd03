"""Converting: the same bytes for any number of workers, bounded memory, and a plan that is followed."""

import hashlib
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.making import llama
from safetensors.torch import load_file, save_file

from quantize8 import convert, verify
from quantize8.artifact.manifest import read_manifest
from quantize8.artifact.outliers import Calibrated
from quantize8.conversion.driver import Writer, places
from quantize8.destinations.local import WeightFile
from quantize8.errors import OutputError
from quantize8.kernels import reference
from quantize8.kernels.cpu import CpuQuantizer
from quantize8.kernels.scales import ScaleSearch, search_absmax
from quantize8.sources import open_checkpoint
from quantize8.sources.structure import plain_tensors


def digests(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_two_conversions_are_byte_identical_with_one_and_with_two_workers(smollm2, smollm2_int8, tmp_path):
    for workers in (1, 2):
        convert(str(smollm2), tmp_path / str(workers), workers=workers)
    assert digests(tmp_path / "1") == digests(tmp_path / "2") == digests(smollm2_int8)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_every_tensor_is_what_the_reference_says(dtype, tmp_path):
    source = llama(tmp_path / "source", dtype=dtype, shards=2)
    result = convert(str(source), tmp_path / "out")
    stored = load_file(tmp_path / "out" / "model.safetensors")
    original = {name: value for path in source.glob("*.safetensors") for name, value in load_file(path).items()}
    for name, value in original.items():
        module = name.removesuffix(".weight")
        if module not in result.plan.modules:
            assert torch.equal(stored[name], value) and stored[name].dtype == value.dtype, name
            continue
        codes, absmax = reference.quantize_rowwise(value.float().numpy())
        np.testing.assert_array_equal(stored[name].numpy(), codes, name)
        np.testing.assert_array_equal(stored[f"{module}.SCB"].numpy(), absmax)
        assert stored[f"{module}.weight_format"].tolist() == 0
    assert len(stored) == len(original) + 2 * len(result.plan.modules)


def test_the_file_is_what_the_safetensors_library_would_write(tmp_path):
    convert(str(llama(tmp_path / "source")), tmp_path / "out")
    ours = tmp_path / "out" / "model.safetensors"
    save_file(load_file(ours), tmp_path / "theirs.safetensors", metadata={"format": "pt"})
    assert ours.read_bytes() == (tmp_path / "theirs.safetensors").read_bytes()


def test_blocks_do_not_show_in_the_result(tmp_path, monkeypatch):
    source = llama(tmp_path / "source", hidden=160)
    convert(str(source), tmp_path / "whole")
    monkeypatch.setattr("quantize8.sources.base.BLOCK_BYTES", 1)  # 64 rows, or one, at a time
    convert(str(source), tmp_path / "blocks", workers=3)
    assert digests(tmp_path / "whole") == digests(tmp_path / "blocks")


def test_small_files_come_along_and_the_config_says_what_was_done(tmp_path):
    source = llama(tmp_path / "source")
    (source / "tokenizer.json").write_text("{}")
    (source / "1_Pooling").mkdir()
    (source / "1_Pooling" / "config.json").write_text('{"pooling": 1}')
    (source / "pytorch_model.bin").write_bytes(b"not copied")
    convert(str(source), tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "{}"
    assert (tmp_path / "out" / "1_Pooling" / "config.json").read_text() == '{"pooling": 1}'
    assert not (tmp_path / "out" / "pytorch_model.bin").exists()
    ours, theirs = (json.loads((folder / "config.json").read_text()) for folder in (tmp_path / "out", source))
    assert ours.pop("quantization_config")["llm_int8_skip_modules"] == ["lm_head"]
    assert ours == theirs


def test_manifest_tells_source_recipe_and_errors(tmp_path):
    source = llama(tmp_path / "source")
    result = convert(str(source), tmp_path / "out", threshold=5.0)
    manifest = read_manifest(tmp_path / "out")
    assert manifest == result.manifest
    assert manifest.source == {"id": "source"} and manifest.recipe["threshold"] == 5.0
    weight = load_file(source / "model.safetensors")["model.layers.0.mlp.up_proj.weight"].float().numpy()
    codes, absmax = reference.quantize_rowwise(weight)
    entry = manifest.tensors["model.layers.0.mlp.up_proj.weight"].quantized
    error = np.linalg.norm(weight - reference.dequantize(codes, absmax)) / np.linalg.norm(weight)
    assert entry.relative_error == pytest.approx(error, rel=1e-4)
    assert entry.absmax_range == (absmax.min(), absmax.max())
    stats = reference.column_stats(weight, codes, absmax)
    assert entry.outliers == stats.outliers.sum()
    column, outliers, peak = entry.worst_columns[0]
    assert outliers == stats.outliers.max() and peak == stats.absmax[column]
    assert manifest.kept == {"lm_head": "output head", "model.embed_tokens": "embedding"}


@pytest.mark.parametrize("format", ["bitsandbytes", "compressed-tensors"])
def test_searched_scales_are_what_the_definition_says(format, tmp_path):
    source = llama(tmp_path / "source")
    result = convert(str(source), tmp_path / "out", format=format, scale="mse")
    plain = convert(str(source), tmp_path / "plain", format=format)
    checkpoint, original = open_checkpoint(str(tmp_path / "out")), load_file(source / "model.safetensors")
    for module in result.plan.modules:
        weight = original[f"{module}.weight"].numpy()
        codes, absmax = reference.quantize_rowwise(weight, search_absmax(weight, ScaleSearch()))
        for found, expected in zip(
            checkpoint.int8_rows(f"{module}.weight", 0, len(weight)), (codes, absmax), strict=True
        ):
            np.testing.assert_array_equal(found, expected)
        entry, other = (each.errors[f"{module}.weight"] for each in (result, plain))
        assert (entry.scale, other.scale) == ("mse", "absmax") and entry.relative_error <= other.relative_error
        assert entry.absmax_range == (absmax.min(), absmax.max())
    assert sum(each.relative_error for each in result.errors.values()) < sum(
        each.relative_error for each in plain.errors.values()
    )
    manifest = verify(tmp_path / "out") and read_manifest(tmp_path / "out")
    assert manifest == result.manifest
    assert '"scale"' not in (tmp_path / "plain" / "quantize8.json").read_text()


def test_searched_scales_pass_through_other_formats_untouched(tmp_path):
    convert(str(llama(tmp_path / "source")), tmp_path / "out", scale="mse")
    convert(str(tmp_path / "out"), tmp_path / "other", format="compressed-tensors")
    convert(str(tmp_path / "other"), tmp_path / "back")
    assert digests(tmp_path / "back")["model.safetensors"] == digests(tmp_path / "out")["model.safetensors"]


def test_searched_scales_do_not_depend_on_workers_or_blocks(tmp_path, monkeypatch):
    source = llama(tmp_path / "source", hidden=160)
    convert(str(source), tmp_path / "whole", scale="mse", workers=1)
    monkeypatch.setattr("quantize8.sources.base.BLOCK_BYTES", 1)
    convert(str(source), tmp_path / "blocks", scale="mse", workers=3)
    monkeypatch.setattr("quantize8.kernels.cpu.chosen", lambda: "generic")
    convert(str(source), tmp_path / "generic", scale="mse")
    assert digests(tmp_path / "whole") == digests(tmp_path / "blocks") == digests(tmp_path / "generic")


def test_calibration_weighs_the_search(tmp_path, monkeypatch):
    """By the mean square of each layer's inputs, for the columns that are not stored exactly."""
    source, rng = llama(tmp_path / "source", hidden=160), np.random.default_rng(0)
    original = load_file(source / "model.safetensors")
    names = [name.removesuffix(".weight") for name in original if "_proj" in name and "layers.0" in name]
    found = {}
    for name in names:
        wide = original[f"{name}.weight"].shape[1]
        mean_square = np.exp(2 * rng.normal(size=wide)).astype(np.float32)
        found[name] = Calibrated(rng.permutation(wide)[:9].astype(np.int32), 5, mean_square, mean_square)
    monkeypatch.setattr("quantize8.calibration.calibrate.calibrate", lambda *_, **__: found)
    (tmp_path / "text").write_text("words")
    convert(str(source), tmp_path / "out", scale="mse", calibrate=tmp_path / "text")
    stored, unlike = load_file(tmp_path / "out" / "model.safetensors"), 0
    for name, value in original.items():
        if f"{name.removesuffix('.weight')}.SCB" not in stored:
            continue
        module, weight = name.removesuffix(".weight"), value.numpy()
        one = found.get(module)
        search = ScaleSearch() if one is None else ScaleSearch(one.mean_square, one.columns[:5])
        np.testing.assert_array_equal(stored[f"{module}.SCB"], search_absmax(weight, search), name)
        if one is not None:
            unlike += (search_absmax(weight, ScaleSearch(one.mean_square)) != stored[f"{module}.SCB"].numpy()).any()
    assert unlike and verify(tmp_path / "out")


def test_conv1d_and_importance_by_column(mgm, tmp_path):
    """GPT-2 stores [K, N]: the importance is of the columns that are written."""
    plan = convert(str(mgm), tmp_path / "out", scale="mse", dry_run=True).plan
    name = next(name for name in plan.transposed if name in plan.searches)
    columns = plan.shape_of(plan.checkpoint.tensors[name])[1]
    plan = replace(plan, searches={name: ScaleSearch(np.linspace(0, 1, columns, dtype=np.float32))})
    (unit,) = plan.units
    file = WeightFile(tmp_path / unit.shard.file, unit.shard.header, unit.shard.nbytes)
    file.reserve()
    writer = Writer(plan, places(unit, [file]))
    record = writer.write(name, CpuQuantizer())[name]
    other = next(key for key in plan.checkpoint.tensors if key in plan.transposed and key != name)
    assert writer.write(other, CpuQuantizer())[other].quantized.scale == "absmax"
    file.finish()
    weight = np.concatenate(list(plan.checkpoint.blocks(name))).T
    absmax = search_absmax(weight, plan.searches[name])
    assert (absmax < search_absmax(weight, ScaleSearch())).any()  # or nothing would be tested
    assert record.quantized.scale == "mse"
    assert record.quantized.absmax_range == (absmax.min(), absmax.max())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scale": "l2"}, "scale l2: unknown; name one of absmax, mse"),
        ({"scale": "mse", "device": "cuda"}, "scale mse: the search runs on the CPU; leave out --device cuda"),
        ({"scale": "mse", "format": "float16"}, "scale mse: --format float16 does not support it; leave it out"),
    ],
)
def test_scales_that_cannot_be_are_refused(options, message, tmp_path):
    with pytest.raises(OutputError) as caught:
        convert(str(llama(tmp_path / "source")), tmp_path / "out", **options)
    assert str(caught.value) == message and not (tmp_path / "out").exists()


@pytest.mark.parametrize("options", [{}, {"format": "compressed-tensors"}, {"dry_run": True}])
def test_an_int8_source_has_no_scales_to_search(options, tmp_path):
    convert(str(llama(tmp_path / "source")), tmp_path / "int8", recipe="int8")
    with pytest.raises(OutputError, match=r"scale mse: int8 is int8 already, with its scales; leave it out"):
        convert(str(tmp_path / "int8"), tmp_path / "out", scale="mse", **options)


def test_scales_are_searched_on_the_cpu_where_a_gpu_would_be_taken(tmp_path, monkeypatch):
    monkeypatch.setattr("quantize8.conversion.driver.resolve", lambda device: pytest.fail("asked for a device"))
    convert(str(llama(tmp_path / "source")), tmp_path / "out", scale="mse")


def test_dry_run_foretells_the_size_and_writes_nothing(tmp_path):
    source = llama(tmp_path / "source")
    plan = convert(str(source), tmp_path / "out", dry_run=True, max_shard_size="10KB").plan
    assert not (tmp_path / "out").exists()
    convert(str(source), tmp_path / "out", max_shard_size="10KB")
    sizes = {path.name: path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors")}
    assert sizes == {shard.file: shard.nbytes for shard in plan.shards}
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == set(sizes)
    names = {name for path in (tmp_path / "out").glob("*.safetensors") for name in load_file(path)}
    assert set(index["weight_map"]) == names


def test_progress_counts_the_source_and_ends_at_all_of_it(tmp_path):
    seen = []
    source = llama(tmp_path / "source")
    result = convert(str(source), tmp_path / "out", workers=1, progress=lambda done, total: seen.append((done, total)))
    done, totals = zip(*seen, strict=True)
    assert list(done) == sorted(done) and done[-1] == result.plan.source_bytes and set(totals) == {done[-1]}


def test_default_folder_is_the_name_with_int8(tmp_path, monkeypatch):
    source = llama(tmp_path / "tiny")
    monkeypatch.chdir(tmp_path)
    assert convert(str(source)).out == Path("tiny-int8")
    assert (tmp_path / "tiny-int8" / "quantize8.json").is_file()


def test_one_safetensors_file_can_be_the_source(tmp_path):
    source = llama(tmp_path / "source")
    convert(str(source / "model.safetensors"), tmp_path / "file")
    convert(str(source), tmp_path / "folder")
    assert (tmp_path / "file" / "model.safetensors").read_bytes() == (
        tmp_path / "folder" / "model.safetensors"
    ).read_bytes()


def test_an_unknown_architecture_is_converted_by_names_and_shapes(tmp_path):
    source = llama(tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    config |= {"architectures": ["SecretForCausalLM"], "model_type": "secret"}
    (source / "config.json").write_text(json.dumps(config))
    plan = convert(str(source), tmp_path / "out").plan
    assert len(plan.modules) == 14 and plan.skip_list == ["lm_head", "model.embed_tokens"]


_PEAK = """
import sys
from quantize8 import convert
convert(sys.argv[1], sys.argv[2], workers=2, check=False)
from quantize8.commands.run import peak_rss
print(peak_rss())
assert "torch" not in sys.modules and "transformers" not in sys.modules
"""


def peak_rss(source: Path, out: Path) -> int:
    """Peak memory of a separate process that converts."""
    done = subprocess.run(
        [sys.executable, "-c", _PEAK, str(source), str(out)], capture_output=True, text=True, check=True
    )
    return int(done.stdout)


def sparse_llama(folder: Path, layers: int) -> Path:
    """A checkpoint of zeros in sparse files: 27 MB per layer, four layers per file."""
    from quantize8.formats.base import OutTensor, index, plan_shards

    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 1024,
        "intermediate_size": 3584,
        "num_hidden_layers": layers,
        "num_attention_heads": 8,
        "num_key_value_heads": 1,
        "vocab_size": 64,
        "tie_word_embeddings": True,
    }
    names = dict(plain_tensors("LlamaForCausalLM", config))
    del names["lm_head.weight"]
    shards = plan_shards(([OutTensor(name, "F16", shape)] for name, shape in names.items()), "110MB")
    folder.mkdir()
    for shard in shards:
        with (folder / shard.file).open("wb") as file:
            file.write(shard.header)
            file.truncate(shard.nbytes)
    for name, content in index(shards).items():
        (folder / name).write_bytes(content)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_memory_does_not_grow_with_the_model(tmp_path):
    """Four times the layers: the peak grows by less than one tensor (7 MB), and stays far below the model."""
    small = peak_rss(sparse_llama(tmp_path / "small", 8), tmp_path / "small-int8")
    large = peak_rss(sparse_llama(tmp_path / "large", 32), tmp_path / "large-int8")
    print(f"peak {small / 1e6:.0f} MB at 8 layers, {large / 1e6:.0f} MB at 32")
    assert large - small < 8e6 and large < 400e6
