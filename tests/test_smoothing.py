"""Smoothing changes no result: powers of two go into weights and out of what feeds them, or are not applied."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.gguf_files import assemble, config_of, folder_of, write_tokenizer
from helpers.making import llama, mixtral, word_tokenizer
from rich.console import Console
from safetensors.torch import load_file, save_file

from quantize8 import SourceError, convert, load, reports, verify
from quantize8.artifact.manifest import digest, read_manifest
from quantize8.artifact.outliers import Calibrated
from quantize8.calibration import smoothing
from quantize8.calibration.calibrate import calibrate
from quantize8.calibration.smoothing import smooth
from quantize8.errors import OutputError
from quantize8.kernels import reference
from quantize8.runtime.streaming import streamed
from quantize8.sources import base, open_checkpoint
from quantize8.sources.smoothing import Factors, SmoothedCheckpoint
from quantize8.sources.structure import FAMILIES

IDS = torch.arange(5, 45)[None]
TEXT = " ".join(f"w{(7 * i) % 60}" for i in range(90))
DTYPES = [torch.float16, torch.bfloat16, torch.float32]
LAYER = "model.layers.0"
ATTENTION, FEED = f"{LAYER}.self_attn", f"{LAYER}.mlp"


def tiny(folder: Path, family: str, dtype: torch.dtype = torch.float32, **changes) -> Path:
    """A model of a family in a folder, its weights rounded to a dtype."""
    source = folder_of(folder, config_of(family, **changes), tokenizer=False)
    state = {name: value.to(dtype) for name, value in load_file(source / "model.safetensors").items()}
    save_file(state, source / "model.safetensors", metadata={"format": "pt"})
    return source


def statistics(source: Path) -> dict[str, Calibrated]:
    """Made-up inputs for every module, from 1e-3 to 1e3."""
    rng, found = np.random.default_rng(0), {}
    for name, info in open_checkpoint(str(source)).tensors.items():
        peaks = (10.0 ** rng.uniform(-3, 3, info.shape[-1])).astype(np.float32)
        found[name.removesuffix(".weight")] = Calibrated(np.zeros(0, np.int32), 0, peaks**2, peaks)
    return found


def logits(checkpoint) -> torch.Tensor:
    with streamed(checkpoint) as model, torch.inference_mode():
        return model(IDS).logits


def powers(factors: np.ndarray) -> np.ndarray:
    mantissa, exponent = np.frexp(factors)
    assert factors.dtype == np.float32 and (mantissa == 0.5).all()
    return exponent - 1


def values(checkpoint, name: str) -> np.ndarray:
    return np.concatenate(list(checkpoint.blocks(name, 1000))).astype(np.float32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", ["llama", "llama-biased", "llama-tied", "mistral", "qwen2", "qwen3"])
def test_logits_are_those_of_the_source_bit_for_bit(family, dtype, tmp_path):
    """Each product of a weight and an activation is the same number, and the sums have the same order."""
    source = tiny(tmp_path / "source", family, dtype)
    checkpoint = open_checkpoint(str(source))
    smoothed = smooth(checkpoint, statistics(source), 0.5)
    assert torch.equal(logits(smoothed), logits(checkpoint))
    assert smoothed.left == 0 or dtype == torch.float16
    changed = [
        name for name in checkpoint.tensors if not np.array_equal(*(values(c, name) for c in (checkpoint, smoothed)))
    ]
    assert {name.split(".")[-2] for name in changed} >= {
        "input_layernorm", "post_attention_layernorm", *(f"{kind}_proj" for kind in ("q", "k", "v", "gate", "up")),
    }  # fmt: skip
    if dtype != torch.float16:  # which cannot hold small numbers made smaller
        assert {name.split(".")[-2] for name in changed} >= {"o_proj", "down_proj"}
    for name in ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"):
        assert name not in changed


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("family", ["llama-biased", "mistral", "qwen2"])
def test_query_heads_share_the_factors_of_their_value_head(family, kv_heads, tmp_path):
    source = tiny(tmp_path / "source", family, num_key_value_heads=kv_heads)
    checkpoint = open_checkpoint(str(source))
    smoothed = smooth(checkpoint, statistics(source), 0.5)
    assert torch.equal(logits(smoothed), logits(checkpoint))
    columns = powers(smoothed.factors[f"{ATTENTION}.o_proj.weight"].columns)
    rows = powers(smoothed.factors[f"{ATTENTION}.v_proj.weight"].rows)
    size = len(columns) // 4
    for head in range(4):
        shared = head * kv_heads // 4
        np.testing.assert_array_equal(columns[head * size :][:size], -rows[shared * size :][:size])
    assert columns.any() and smoothed.left == 0


@pytest.mark.parametrize("alpha", [0.25, 0.5, 0.6])
def test_factors_are_the_papers_rounded_to_a_power_of_two(alpha, tmp_path):
    source = tiny(tmp_path / "source", "llama")
    found, state = statistics(source), load_file(source / "model.safetensors")
    smoothed = smooth(open_checkpoint(str(source)), found, alpha)

    def expected(kinds: list[str]) -> np.ndarray:
        weights = np.concatenate([state[f"{kind}.weight"].numpy() for kind in kinds])
        s = found[kinds[0]].absmax.astype(np.float64) ** alpha / np.abs(weights).max(0) ** (1 - alpha)
        return np.rint(np.log2(s)).astype(int)

    for norm, kinds in (
        (f"{LAYER}.input_layernorm", [f"{ATTENTION}.{kind}_proj" for kind in "qkv"]),
        (f"{LAYER}.post_attention_layernorm", [f"{FEED}.gate_proj", f"{FEED}.up_proj"]),
        (f"{FEED}.up_proj", [f"{FEED}.down_proj"]),
    ):
        log2 = expected(kinds)
        assert len(set(log2.tolist())) > 3
        np.testing.assert_array_equal(powers(smoothed.factors[f"{norm}.weight"].rows), -log2)
        for kind in kinds:
            np.testing.assert_array_equal(powers(smoothed.factors[f"{kind}.weight"].columns), log2)
    heads = expected([f"{ATTENTION}.o_proj"]).reshape(2, 2, 16)  # value heads, query heads of each, columns
    largest = np.repeat(heads.max(1, keepdims=True), 2, axis=1).ravel()
    np.testing.assert_array_equal(powers(smoothed.factors[f"{ATTENTION}.o_proj.weight"].columns), largest)
    assert smoothed.features == 2 * (64 + 64 + 32 + 96)  # by layer: two norms, value rows, up rows


def hostile(state: dict[str, torch.Tensor]) -> None:
    """Rows and columns of float16 that cannot take a factor, each where a group would apply one."""
    for name, value in state.items():
        if "norm" in name:
            value[:] = 1.5
        elif "proj" in name:
            value[:] = value.sign() + (value == 0)  # of magnitude 1: all else can be scaled
    state[f"{ATTENTION}.k_proj.weight"][3, 5] = 65000
    state[f"{LAYER}.post_attention_layernorm.weight"][7] = 60000
    state[f"{LAYER}.post_attention_layernorm.weight"][8] = (
        6.2e-5 + 6e-8
    )  # nearly the smallest normal number, all digits used
    state[f"{FEED}.down_proj.weight"][2, 9] = 6e-8  # the smallest of all
    state[f"{FEED}.up_proj.weight"][11, [4, 7]] = 6e-8  # in column 4 a factor of that column makes up for it
    state[f"{FEED}.up_proj.weight"][12] = 0
    state[f"{ATTENTION}.v_proj.weight"][1, 2] = -65504


def test_a_layer_that_the_model_does_not_have_is_left_alone(tmp_path):
    source = word_tokenizer(llama(tmp_path / "source", dtype=torch.bfloat16))
    config = json.loads((source / "config.json").read_text()) | {"num_hidden_layers": 1}
    (source / "config.json").write_text(json.dumps(config))
    checkpoint = open_checkpoint(str(source))
    smoothed = smooth(checkpoint, calibrate(checkpoint, TEXT, 0), 0.5)
    assert {name.split(".")[2] for name in smoothed.factors} == {"0"}
    assert torch.equal(logits(smoothed), logits(checkpoint))


def test_what_the_dtype_cannot_hold_is_left_as_it_is(tmp_path, monkeypatch):
    source = llama(tmp_path / "source", layers=1, edit=hostile)
    checkpoint = open_checkpoint(str(source))
    found = statistics(source)
    for kind in ("q", "k", "v", "gate", "up", "down", "o"):
        part = ATTENTION if kind in "qkvo" else FEED
        found[f"{part}.{kind}_proj"].absmax[:] = 16.0  # s is 4 where all weights are 1
    found[f"{ATTENTION}.q_proj"].absmax[2] = 1e7
    found[f"{FEED}.gate_proj"].absmax[7] = 1e-9  # the least s there is, by which 60000 would be divided
    found[f"{FEED}.down_proj"].absmax[9] = 1e-9
    found[f"{FEED}.down_proj"].absmax[:4] = 1e-3  # a factor unlike those of the rows in later blocks
    found[f"{FEED}.down_proj"].absmax[13:16] = [0, np.nan, np.inf]
    smoothed = smooth(checkpoint, found, 0.5)
    monkeypatch.setattr(base, "BLOCK_BYTES", 300)  # a few rows each
    in_blocks = smooth(checkpoint, found, 0.5)
    for name, factors in smoothed.factors.items():
        for part in ("rows", "columns"):
            np.testing.assert_array_equal(getattr(factors, part), getattr(in_blocks.factors[name], part))

    def unscaled(name: str, part: str) -> list[int]:
        return np.flatnonzero(powers(getattr(smoothed.factors[name], part)) == 0).tolist()

    # q, k and v share their factors, and -65504 in v bears none over 1; 65000 in k is why column 5 has a small one
    assert unscaled(f"{LAYER}.input_layernorm.weight", "rows") == [2]
    assert powers(smoothed.factors[f"{ATTENTION}.k_proj.weight"].columns)[5] == 2 - 8
    assert unscaled(f"{LAYER}.post_attention_layernorm.weight", "rows") == [7, 8]
    for kind in ("gate", "up"):
        assert unscaled(f"{FEED}.{kind}_proj.weight", "columns") == [7, 8]
    assert unscaled(f"{FEED}.up_proj.weight", "rows") == unscaled(f"{FEED}.down_proj.weight", "columns")
    assert unscaled(f"{FEED}.up_proj.weight", "rows") == [9, 11, 13, 14, 15]
    assert torch.equal(logits(smoothed), logits(checkpoint))
    assert smoothed.left == 1 + 2 + 2
    for name in checkpoint.tensors:
        assert np.isfinite(values(smoothed, name)).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_weights_stay_in_the_range_of_float16_that_int8_starts_from(dtype, tmp_path):
    source = llama(tmp_path / "source", layers=1, dtype=dtype)
    found = statistics(source)
    found[f"{ATTENTION}.q_proj"].absmax[5:8] = 3e38  # by itself s would be 2^15
    found[f"{FEED}.down_proj"].absmax[9] = 1e-38
    state = load_file(source / "model.safetensors")
    state[f"{ATTENTION}.q_proj.weight"][3, 5] = 4
    save_file(state, source / "model.safetensors", metadata={"format": "pt"})
    checkpoint = open_checkpoint(str(source))
    smoothed = smooth(checkpoint, found, 0.9)
    assert smoothed.factors[f"{ATTENTION}.q_proj.weight"].columns[5] == 1 and smoothed.left
    assert max(np.abs(values(smoothed, name)).max() for name in checkpoint.tensors) <= reference.FLOAT16_MAX
    assert torch.equal(logits(smoothed), logits(checkpoint))


def test_rows_and_blocks_of_any_size_are_the_same_numbers(tmp_path):
    source = tiny(tmp_path / "source", "llama-biased", torch.bfloat16)
    checkpoint = open_checkpoint(str(source))
    smoothed = smooth(checkpoint, statistics(source), 0.5)
    assert smoothed.tensors == checkpoint.tensors and smoothed.config == checkpoint.config
    assert smoothed.stored_bytes == checkpoint.stored_bytes and smoothed.origin is checkpoint
    for name, info in checkpoint.tensors.items():
        expected = values(checkpoint, name)
        if name in smoothed.factors:
            factor = smoothed.factors[name]
            rows = np.ones(info.shape[0], np.float32) if factor.rows is None else factor.rows
            columns = 1 if factor.columns is None else factor.columns
            expected = (expected.T * rows).T * columns
        for size in (1, 700, None):
            blocks = list(smoothed.blocks(name, size, 1))
            assert all(block.dtype == checkpoint.rows(name, 0, 1).dtype for block in blocks)
            np.testing.assert_array_equal(np.concatenate(blocks).astype(np.float32), expected)
        np.testing.assert_array_equal(smoothed.rows(name, 1, 3).astype(np.float32), expected[1:3])


def test_codes_of_an_int8_weight_are_not_those_of_the_product(tmp_path):
    source = llama(tmp_path / "source")
    convert(str(source), tmp_path / "int8")
    stored = open_checkpoint(str(tmp_path / "int8"))
    name, other = f"{FEED}.down_proj.weight", f"{FEED}.up_proj.weight"
    smoothed = SmoothedCheckpoint(stored, {name: Factors(rows=np.full(32, 2, np.float32))})
    assert not smoothed.tensors[name].is_int8 and smoothed.tensors[other].is_int8 and smoothed.decoded == stored.decoded
    np.testing.assert_array_equal(smoothed.rows(name, 0, 32), 2 * stored.rows(name, 0, 32))
    np.testing.assert_array_equal(smoothed.int8_rows(other, 0, 9)[0], stored.int8_rows(other, 0, 9)[0])


def test_only_known_families_are_smoothed(tmp_path):
    assert smoothing._KNOWN | {"Gemma2ForCausalLM"} == FAMILIES.keys()
    for source, name in (
        (mixtral(tmp_path / "mixtral"), "MixtralForCausalLM"),
        (llama(tmp_path / "gemma"), "Gemma2ForCausalLM"),
    ):
        config = json.loads((source / "config.json").read_text())
        (source / "config.json").write_text(json.dumps(config | {"architectures": [name]}))
        with pytest.raises(SourceError, match=f"smoothing is not known to be exact for {name}; leave --smooth out"):
            smooth(open_checkpoint(str(source)), {}, 0.5)


def test_a_quantized_source_is_refused(tmp_path):
    convert(str(llama(tmp_path / "source")), tmp_path / "int8")
    with pytest.raises(SourceError, match="int8: is quantized, and only floating-point weights can be smoothed"):
        smooth(open_checkpoint(str(tmp_path / "int8")), {}, 0.5)


def test_the_report_says_how_much_is_smoothed(tmp_path):
    source = word_tokenizer(llama(tmp_path / "source"))  # float16: not all of it can be
    (tmp_path / "text").write_text(TEXT)
    result = convert(str(source), tmp_path / "out", calibrate=tmp_path / "text", smooth=0.9)
    left = result.plan.checkpoint.left
    assert left
    console = Console(width=160)
    with console.capture() as shown:
        console.print(reports.conversion(result))
    whole = 2 * (32 + 32 + 16 + 48)
    assert f"{whole - left} features; {left} left, whose weights would overflow or lose digits" in shown.get()
    planned = convert(str(source), tmp_path / "new", calibrate=tmp_path / "text", smooth=0.9, dry_run=True)
    assert planned.plan.smoothed == "" and not (tmp_path / "new").exists()  # nothing is measured
    plain = convert(str(source), tmp_path / "plain", calibrate=tmp_path / "text")
    assert plain.plan.smoothed == ""


@pytest.mark.parametrize("heads", [None, 0, 5, 64, "4"])
def test_heads_that_do_not_fit(heads, tmp_path):
    source = llama(tmp_path / "source")
    config = json.loads((source / "config.json").read_text()) | {"num_attention_heads": heads}
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(SourceError, match=f"num_attention_heads {heads} in config.json does not fit"):
        smooth(open_checkpoint(str(source)), {}, 0.5)


def test_a_layer_that_is_not_whole_is_left_alone(tmp_path):
    def remove(state: dict[str, torch.Tensor]) -> None:
        del state[f"{ATTENTION}.v_proj.weight"], state[f"{LAYER}.post_attention_layernorm.weight"]

    source = llama(tmp_path / "source", layers=1, dtype=torch.bfloat16, edit=remove)
    smoothed = smooth(open_checkpoint(str(source)), statistics(source), 0.5)
    assert sorted(smoothed.factors) == [f"{FEED}.down_proj.weight", f"{FEED}.up_proj.weight"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"smooth": 0.5}, r"smooth 0.5: needs calibration; add --calibrate FILE"),
        *(({"smooth": alpha, "calibrate": "text"}, "must be between 0 and 1") for alpha in (0, 1, -1, float("nan"))),
    ],
)
def test_options_that_do_not_fit(options, message, tmp_path):
    source = llama(tmp_path / "source")
    (tmp_path / "text").write_text(TEXT)
    if "calibrate" in options:
        options = options | {"calibrate": tmp_path / "text"}
    with pytest.raises(OutputError, match=message):
        convert(str(source), tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "options",
    [{}, {"format": "compressed-tensors"}, {"format": "compressed-tensors", "scheme": "w8a16"}],
    ids=["bitsandbytes", "w8a8", "w8a16"],
)
def test_an_artifact_of_smoothed_weights(options, tmp_path):
    source = word_tokenizer(llama(tmp_path / "source", dtype=torch.bfloat16))
    (tmp_path / "text").write_text(TEXT)
    (tmp_path / "recipe.toml").write_text(f'threshold = 6.0\nskip = ["{FEED}.down_proj", "*.k_proj"]\n')
    result = convert(
        str(source),
        tmp_path / "out",
        calibrate=tmp_path / "text",
        smooth=0.5,
        recipe=str(tmp_path / "recipe.toml"),
        **options,
    )
    manifest = read_manifest(tmp_path / "out")
    assert manifest.calibration["smooth"] == 0.5
    verify(tmp_path / "out")

    checkpoint = open_checkpoint(str(source))
    smoothed = smooth(checkpoint, calibrate(checkpoint, TEXT, 0), 0.5)
    columns = calibrate(smoothed, TEXT)
    stored = open_checkpoint(str(tmp_path / "out"))
    for name in checkpoint.tensors:
        expected, module = values(smoothed, name), name.removesuffix(".weight")
        if module in result.plan.modules:
            codes, _ = reference.quantize_rowwise(expected)
            np.testing.assert_array_equal(stored.int8_rows(name, 0, len(codes))[0], codes)
            np.testing.assert_array_equal(result.plan.calibrated[module].columns, columns[module].columns)
        else:
            np.testing.assert_array_equal(values(stored, name), expected)
    assert {"k_proj", "down_proj"} <= {name.split(".")[-1] for name in result.plan.kept}
    records = manifest.tensors.values()
    digests = {record.quantized.source_blake3 for record in records if record.quantized}
    raw = smoothed.rows(f"{FEED}.up_proj.weight", 0, 48)
    assert digest(raw.tobytes()) in digests  # of the numbers after smoothing

    with torch.inference_mode():
        ours = load(tmp_path / "out", "cpu", mode="hybrid")[0](IDS).logits.float()
        source_logits = load(source, "cpu", dtype="float32")[0](IDS).logits
    assert torch.linalg.vector_norm(ours - source_logits) < 0.05 * torch.linalg.vector_norm(source_logits)


def test_a_gguf_file_is_smoothed_too(tmp_path):
    """Its settings and tokenizer are still found when it is read through the factors."""
    source = folder_of(tmp_path / "source", config_of("llama"))
    assemble(source, tmp_path / "tiny.gguf")
    (tmp_path / "text").write_text("the an and and the, an the and. the the an, and an the")
    convert(str(tmp_path / "tiny.gguf"), tmp_path / "out", calibrate=tmp_path / "text", smooth=0.5)
    before, after = (open_checkpoint(str(tmp_path / name)) for name in ("tiny.gguf", "out"))
    ratio = values(before, f"{LAYER}.input_layernorm.weight") / values(after, f"{LAYER}.input_layernorm.weight")
    assert len(set(powers(ratio).tolist())) > 1


def test_a_gguf_file_of_smoothed_weights(tmp_path):
    source = folder_of(tmp_path / "source", config_of("llama"), tokenizer=False)
    write_tokenizer(tmp_path / "tokenizer")
    for path in (tmp_path / "tokenizer").iterdir():
        path.rename(source / path.name)
    (tmp_path / "text").write_text("the an and and the, an the and. the the an, and an the")
    given = {"format": "gguf", "scale": "mse", "calibrate": tmp_path / "text"}
    for smooth_by in (None, 0.5):
        convert(str(source), tmp_path / str(smooth_by), smooth=smooth_by, **given)
    plain, smoothed = (open_checkpoint(str(tmp_path / str(smooth_by))) for smooth_by in (None, 0.5))
    ratio = values(plain, f"{LAYER}.input_layernorm.weight") / values(smoothed, f"{LAYER}.input_layernorm.weight")
    assert len(set(powers(ratio).tolist())) > 1
    expected = logits(open_checkpoint(str(source)))
    for found in (logits(plain), logits(smoothed)):  # both are off by what 8 bits a weight cost
        assert torch.linalg.vector_norm(found - expected) < 0.06 * torch.linalg.vector_norm(expected)
