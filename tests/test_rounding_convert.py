"""`convert --rounding gptq`: the codes in each format, resuming, parts, stores, and what the artifact says of them."""

import json
import shutil

import fsspec
import numpy as np
import pytest
import torch
from helpers.artifacts import digests
from helpers.gguf_files import config_of, folder_of, write_tokenizer
from helpers.making import SIZES, mixtral, saved, word_tokenizer
from rich.console import Console
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from quantize8 import OutputError, cli, convert, load, plan, reports, verify
from quantize8.artifact.card import card
from quantize8.artifact.manifest import read_manifest
from quantize8.calibration import rounding as choosing
from quantize8.calibration.rounding import choose_codes
from quantize8.commands.finalize import finalize
from quantize8.conversion import rounding
from quantize8.files import TEXT as SHIPPED
from quantize8.kernels import GPTQ, NEAREST
from quantize8.sources import open_checkpoint

TEXT = " ".join(f"w{i * i * 7 % 61}" for i in range(300))
WIDE = SIZES | {"hidden_size": 64, "intermediate_size": 96}
FORMATS = {
    "bitsandbytes": {},
    "bitsandbytes-mse": {"scale": "mse"},
    "w8a8": {"format": "compressed-tensors"},
    "groups": {"format": "compressed-tensors", "scheme": "w8a16", "group_size": 32},
    "rotated": {"format": "compressed-tensors", "rotate": 256},
    "gguf": {"format": "gguf"},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Folder with a `source` in two files whose layers' inputs are correlated, and a `text`."""
    folder = tmp_path_factory.mktemp("rounding")
    source = word_tokenizer(saved(folder / "source", LlamaForCausalLM, **WIDE))
    state = load_file(source / "model.safetensors")
    mix = torch.randn(64, 8, generator=torch.Generator().manual_seed(1))
    state["model.embed_tokens.weight"] = (
        state["model.embed_tokens.weight"] * 0.1
        + torch.randn(64, 8, generator=torch.Generator().manual_seed(2)) @ mix.t()
    )
    state["model.layers.0.mlp.up_proj.weight"][3] = 0
    save_file(state, source / "model.safetensors", {"format": "pt"})
    (folder / "text").write_text(TEXT)
    return folder


def options(folder, name: str = "bitsandbytes", **more):
    return {"calibrate": folder / "text", "rounding": "gptq", "check": False, **FORMATS[name], **more}


def source_of(folder, name: str, place):
    if name != "gguf":
        return str(folder / "source")
    source = folder_of(place / "llama", config_of("llama"), tokenizer=False)
    write_tokenizer(source)
    (place / "text").write_text("the cat sat. " * 90)
    return str(source)


def layer_inputs(source, text):
    """The inputs of the Linear layers of the source model for a text, by name, and the layers' weights."""
    model, tokenizer = load(source, "cpu", dtype="float32")
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(
                lambda module, inputs, _, name=name: found.update({name: (inputs[0][0], module.weight.detach())})
            )
    with torch.no_grad():
        model(tokenizer(text, return_tensors="pt")["input_ids"][:, :60])
    return found


@pytest.mark.parametrize("name", FORMATS)
def test_outputs_are_closer_to_those_of_the_source_than_with_nearest_codes(name, folder, tmp_path):
    source, text = source_of(folder, name, tmp_path), TEXT if name != "gguf" else "the cat sat. " * 90
    given = options(tmp_path if name == "gguf" else folder, name)
    chosen = convert(source, tmp_path / "chosen", **given)
    plain = {"rounding": "nearest", "calibrate": None, "scale": "absmax"}
    nearest = convert(source, tmp_path / "nearest", **given | plain)
    assert verify(chosen.out).tensors >= verify(nearest.out).tensors  # outlier columns may be there, too
    ours, theirs, errors = open_checkpoint(str(chosen.out)), open_checkpoint(str(nearest.out)), []
    inputs = layer_inputs(source, text)
    quantized = [layer for layer in inputs if f"{layer}.weight" in chosen.plan.quantized]
    assert len(quantized) >= 14
    for layer in quantized:
        x, weight = inputs[layer]
        for checkpoint in (ours, theirs):
            blocks = checkpoint.blocks(f"{layer}.weight")
            values = np.concatenate([block.astype(np.float32) for block in blocks])
            errors.append(float((x @ (torch.from_numpy(values) - weight).t()).square().sum()))
    before, after = sum(errors[1::2]), sum(errors[::2])
    assert after < 0.6 * before, (after, before)


def test_the_codes_are_those_of_the_pass_and_their_scales_those_of_the_format(folder, tmp_path):
    result = convert(str(folder / "source"), tmp_path / "out", **options(folder))
    nearest = convert(str(folder / "source"), tmp_path / "nearest", check=False)
    kept = {}

    class Keeping:
        wants = staticmethod(lambda name: name in result.plan.quantized)
        rotation = staticmethod(lambda name: 0)
        stored = staticmethod(lambda name: None)
        keep = staticmethod(lambda name, *values: kept.update({name: values}))

        @staticmethod
        def scales(name, weight, importance):
            weight = weight.astype(np.float16).astype(np.float32)
            return weight, (np.abs(weight).max(axis=1, keepdims=True) / np.float32(127)).astype(np.float32)

    choose_codes(open_checkpoint(str(folder / "source")), TEXT, Keeping)
    ours, plain = open_checkpoint(str(result.out)), open_checkpoint(str(nearest.out))
    changed = 0
    for name, (codes, _, is_nearest) in kept.items():
        stored, absmax = ours.int8_rows(name, 0, len(codes))
        np.testing.assert_array_equal(stored, codes)
        np.testing.assert_array_equal(absmax, plain.int8_rows(name, 0, len(codes))[1])
        changed += int((codes != plain.int8_rows(name, 0, len(codes))[0]).sum())
        assert not is_nearest and np.abs(codes).max() <= 127
    assert kept.keys() == set(result.plan.quantized) and changed > 1000


@pytest.mark.parametrize("name", FORMATS)
def test_two_runs_write_the_same_bytes(name, folder, tmp_path, monkeypatch):
    source = source_of(folder, name, tmp_path)
    given = options(tmp_path if name == "gguf" else folder, name)
    convert(source, tmp_path / "one", **given)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    convert(source, tmp_path / "two", **given)
    assert digests(tmp_path / "one") == digests(tmp_path / "two")
    assert not list(tmp_path.glob("**/rounding.*"))


class Stop(Exception):
    pass


@pytest.mark.parametrize("damage", ["none", "codes", "index", "cut", "all"])
@pytest.mark.parametrize("name", ["bitsandbytes", "rotated"])
def test_a_stopped_choice_continues_after_the_last_sound_weight(name, damage, folder, tmp_path, monkeypatch):
    given, source = options(folder, name), str(folder / "source")
    convert(source, tmp_path / "whole", **given)
    monkeypatch.setattr(choosing, "_Pass", Stopping)
    Stopping.left = 9
    with pytest.raises(Stop):
        convert(source, tmp_path / "out", **given)
    (staging,) = (path for path in tmp_path.iterdir() if "out" in path.name)
    codes, index = staging / rounding.CODES_NAME, staging / rounding.INDEX_NAME
    if damage == "codes":
        data = bytearray(codes.read_bytes())
        data[5000] ^= 1  # in the second weight
        codes.write_bytes(data)
    elif damage == "index":
        index.write_bytes(index.read_bytes()[:-7])  # the last line is not whole
    elif damage == "cut":
        codes.write_bytes(codes.read_bytes()[:-3])
    elif damage == "all":
        codes.unlink()
    monkeypatch.undo()
    made = []
    choose = choosing.round_codes
    monkeypatch.setattr(choosing, "round_codes", lambda *args: made.append(1) or choose(*args))
    convert(source, tmp_path / "out", **given)
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")
    assert len(made) == 14 - {"none": 9, "codes": 1, "index": 8, "cut": 8, "all": 0}[damage]
    assert not list(tmp_path.glob("**/rounding.*"))


class Stopping(choosing._Pass):
    """Stops after `left` weights."""

    left = 0

    def _note(self, name, is_nearest):
        super()._note(name, is_nearest)
        if len(self.done) == self.left:
            raise Stop


def test_a_stopped_choice_is_not_continued_with_other_options(folder, tmp_path, monkeypatch):
    given, source = options(folder), str(folder / "source")
    monkeypatch.setattr(choosing, "_Pass", Stopping)
    Stopping.left = 3
    with pytest.raises(Stop):
        convert(source, tmp_path / "out", **given)
    monkeypatch.undo()
    other = given | {"recipe": "int8-all"}
    with pytest.raises(OutputError, match="overwrite"):
        convert(source, tmp_path / "out", **other)
    convert(source, tmp_path / "out", **other, overwrite=True)
    convert(source, tmp_path / "whole", **other)
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")


def test_parts_make_the_choice_once(folder, tmp_path, monkeypatch):
    given = options(folder) | {"max_shard_size": "40KB"}
    source = str(folder / "source")
    convert(source, tmp_path / "whole", **given)
    convert(source, tmp_path / "out", **given, part="1/2")
    monkeypatch.setattr(choosing, "round_codes", lambda *_: pytest.fail("chosen again"))
    convert(source, tmp_path / "out", **given, part="2/2")
    finalize(tmp_path / "out")
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")


def test_a_store_gets_the_same_bytes_and_keeps_no_codes(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    given, source = options(folder), str(folder / "source")
    convert(source, tmp_path / "whole", **given)
    address = f"local://{tmp_path}/store/model"
    monkeypatch.setattr(choosing, "_Pass", Stopping)
    Stopping.left = 5
    with pytest.raises(Stop):
        convert(source, address, **given)
    monkeypatch.undo()
    convert(source, address, **given)
    assert digests(tmp_path / "store" / "model") == digests(tmp_path / "whole")
    assert fsspec.filesystem("local").exists(f"{tmp_path}/store/model/quantize8.json")


def test_the_manifest_and_the_report_say_how_codes_were_chosen(folder, tmp_path):
    result = convert(str(folder / "source"), tmp_path / "out", **options(folder) | {"check": True})
    records = {name: record.quantized for name, record in read_manifest(tmp_path / "out").tensors.items()}
    assert {found.rounding for found in records.values() if found} == {GPTQ}
    assert result.as_json()["rounding"] == "gptq" and result.check.error is not None
    assert "gptq: 14 of 14 weights" in shown(reports.conversion(result))
    page = card(tmp_path / "out", result.manifest, "me/model", None)
    assert "| rounding | gptq for 14 of 14 weights |" in page and "4096 tokens of a text" in page
    assert "to nearest" not in shown(reports.conversion(result))


def shown(page) -> str:
    console = Console(width=200)
    with console.capture() as captured:
        console.print(page)
    return captured.get()


def test_experts_that_the_text_hardly_reaches_are_to_nearest_and_said(folder, tmp_path):
    source = mixtral(tmp_path / "source")
    path = next(source.glob("*.safetensors"))
    state = load_file(path)
    routers = [name for name in state if name.endswith("gate.weight")]
    for name in routers:  # expert 3 is never among the two that a token is sent to
        state[name][3] = 0
        state[name][:3] = state[name][:3].abs()
    for name in state:
        if name.endswith("post_attention_layernorm.weight"):
            state[name].zero_()  # the routers see zeros, and ties go to the first experts
    save_file(state, path, {"format": "pt"})
    word_tokenizer(source)
    given = options(folder, "w8a8")
    result = convert(str(source), tmp_path / "out", **given)
    records = {name: record.quantized for name, record in read_manifest(tmp_path / "out").tensors.items()}
    nearest = {name for name, found in records.items() if found and found.rounding == NEAREST}
    assert nearest and all(".experts." in name for name in nearest)
    assert {name for name, found in records.items() if found and ".self_attn." in name and found.rounding == GPTQ}
    page = shown(reports.conversion(result))
    assert f"{min(nearest)} and {len(nearest) - 1} more to nearest, as the text hardly reaches them" in page
    again = convert(str(source), tmp_path / "again", **given)
    assert again.plan.rounded.nearest == result.plan.rounded.nearest


def test_progress_is_in_bytes_of_the_source_and_twice_complete(folder, tmp_path):
    """The choice of codes has a pass of its own, before the weights are written."""
    calls = []
    convert(str(folder / "source"), tmp_path / "out", **options(folder), progress=lambda *call: calls.append(call))
    totals = [total for _, total in calls]
    assert calls[13][0] == totals[13] == 2 * 4 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 64 * 96)  # of 14 weights in float32
    assert calls[-1][0] == totals[-1] > totals[0] and [done for done, _ in calls[:14]] == sorted(
        {done for done, _ in calls[:14]}
    )


def test_a_plan_does_not_choose(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(choosing, "choose_codes", lambda *_, **__: pytest.fail("chosen"))
    result = plan(str(folder / "source"), **{key: value for key, value in options(folder).items() if key != "check"})
    assert result.to_calibrate and "codes first" in shown(reports.conversion(result))
    cost = result.as_json()["forecast"]["rounding"]
    assert 0 < cost["seconds"] < 60 and 1e7 < cost["memory"] < 8e9
    assert cost["disk"] == 2 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 64 * 96)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"rounding": "gptq"}, "rounding gptq: needs calibration; add --calibrate FILE"),
        ({"rounding": "up"}, "rounding up: unknown; name one of nearest, gptq"),
        ({"rounding": "gptq", "calibrate": "text", "format": "float16"}, "float16"),
        ({"preset": "good"}, "preset good: unknown; name one of llm-int8, best"),
        ({"preset": "best", "format": "float16"}, "float16"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(given, message, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(folder)
    with pytest.raises(OutputError, match=message) as caught:
        convert(str(folder / "source"), tmp_path / "out", **given)
    assert "\n" not in str(caught.value) and not list(tmp_path.iterdir())


@pytest.mark.parametrize("target", ["bitsandbytes", "compressed-tensors"])
def test_preset_best_is_what_measured_best(target, folder, tmp_path):
    given = {"format": target, "check": False}
    result = convert(str(folder / "source"), tmp_path / "best", **given, preset="best", calibrate=folder / "text")
    rotation = {"rotate": 256} if target == "compressed-tensors" else {}
    convert(str(folder / "source"), tmp_path / "same", **options(folder) | given | rotation)
    assert digests(tmp_path / "best") == digests(tmp_path / "same")
    assert bool(result.plan.rotations) == bool(rotation)


def test_preset_best_calibrates_with_the_shipped_text_and_says_so(folder, tmp_path):
    result = convert(str(folder / "source"), tmp_path / "out", preset="best", check=False)
    assert result.plan.options.calibrate == str(SHIPPED)
    assert "by the text in this package" in shown(reports.conversion(result))


def test_the_command_takes_rotate_with_and_without_a_size(folder, tmp_path, monkeypatch):
    for arguments, size in ((["--rotate"], 256), (["--rotate", "16"], 16), (["--rotate=64"], 64)):
        out = tmp_path / str(size)
        command = ["quantize8", "convert", str(folder / "source"), "--format", "compressed-tensors", "--no-check"]
        monkeypatch.setattr("sys.argv", [*command, "--out", str(out), *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert not ended.value.code
        config = json.loads((out / "config.json").read_text())["quantization_config"]["transform_config"]
        assert max(int(name.split("_")[-1]) for name in config["config_groups"]) == (64 if size == 256 else size)
        shutil.rmtree(out)
