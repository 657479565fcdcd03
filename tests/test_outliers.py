"""Artifacts with outlier columns: what is stored, what other loaders see of it, and malformed files."""

import hashlib
import json
import shutil

import pytest
import torch
from helpers.making import llama, mixtral, word_tokenizer
from rich.console import Console
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from quantize8 import ArtifactError, Int8Linear, OutputError, SourceError, convert, evaluate, load, reports, run, verify
from quantize8.artifact.manifest import read_manifest
from quantize8.artifact.outliers import OUTLIERS_NAME, read_outliers
from quantize8.commands.run import Comparison
from quantize8.files import TEXT as ADDRESS
from quantize8.sources import open_checkpoint
from quantize8.sources.hub import needed_files

pytestmark = pytest.mark.filterwarnings("ignore:MatMul8bitLt")

TEXT = " ".join(f"w{i * i * 7 % 63}" for i in range(100))
MODULE = "model.layers.1.mlp.up_proj"
IDS = torch.arange(2, 42)[None]


def in_mode(model, mode: str):
    """The same model in another mode; mode static can only be set this way."""
    for module in model.modules():
        if isinstance(module, Int8Linear):
            module.mode = mode
    return model


def gains(state: dict[str, torch.Tensor]) -> None:
    """A feature that is large at every token."""
    for name in state:
        if "layernorm" in name:
            state[name][11] = 50


def made(folder, dtype=torch.float16, **options):
    """A source with a text, and an artifact of it that was calibrated with this."""
    source = word_tokenizer(llama(folder / "source", hidden=64, dtype=dtype, edit=gains))
    (folder / "text").write_text(TEXT)
    convert(str(source), folder / "out", calibrate=folder / "text", **options)
    return source, folder / "out"


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """Folder with `source`, its `text`, `out` and, without calibration, `plain`."""
    folder = tmp_path_factory.mktemp("outliers")
    source, _ = made(folder, recipe="int8-all")
    convert(str(source), folder / "plain", recipe="int8-all")
    return folder


@pytest.fixture
def artifact(sound, tmp_path):
    return shutil.copytree(sound / "out", tmp_path / "artifact")


def digests(folder) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def logits(model, ids=IDS) -> torch.Tensor:
    with torch.inference_mode():
        return model(ids).logits


def test_the_artifact_is_the_one_without_calibration_and_a_file_beside_it(sound):
    plain, calibrated = digests(sound / "plain"), digests(sound / "out")
    added = {OUTLIERS_NAME, "model.safetensors.index.json"}
    assert set(calibrated) == set(plain) | added
    assert {name for name in plain if plain[name] != calibrated[name]} == {"quantize8.json"}
    weight_map = json.loads((sound / "out" / "model.safetensors.index.json").read_text())["weight_map"]
    assert set(weight_map) == set(load_file(sound / "out" / "model.safetensors"))
    assert set(weight_map.values()) == {"model.safetensors"}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_stored_columns_are_those_of_the_source_in_float16(dtype, tmp_path):
    source, out = made(tmp_path, dtype)
    weights, stored, found = load_file(source / "model.safetensors"), load_file(out / OUTLIERS_NAME), read_outliers(out)
    assert len(found) == 14
    for module, entry in found.items():
        rows, width = weights[f"{module}.weight"].shape
        columns = stored[f"{module}.outlier_columns"].long()
        exact = stored[f"{module}.outlier_weight"]
        assert columns.tolist() == entry.columns.tolist() and len(columns) == width // 8
        assert exact.shape == (rows, exact.shape[1]) and exact.shape[1] <= len(columns)
        assert torch.equal(exact, weights[f"{module}.weight"][:, columns[: exact.shape[1]]].half())
        assert torch.equal(exact, torch.from_numpy(entry.weight))
        assert stored[f"{module}.input_mean_square"].shape == stored[f"{module}.input_absmax"].shape == (width,)
    assert found[MODULE].columns[0] == 11 and found[MODULE].weight.shape[1] >= 1


def test_blocks_do_not_show_in_the_columns(sound, tmp_path, monkeypatch):
    monkeypatch.setattr("quantize8.sources.base.BLOCK_BYTES", 1)
    options = {"calibrate": sound / "text", "recipe": "int8-all"}
    convert(str(sound / "source"), tmp_path / "blocks", workers=3, **options)
    convert(str(sound / "source"), tmp_path / "one", workers=1, **options)
    assert digests(tmp_path / "blocks") == digests(tmp_path / "one") == digests(sound / "out")


def test_the_manifest_tells_text_and_columns(sound):
    manifest = read_manifest(sound / "out")
    assert set(manifest.calibration) == {"text_blake3", "tokens", "outlier_columns", "smooth"}
    assert manifest.calibration["outlier_columns"] == "auto" and len(manifest.calibration["text_blake3"]) == 64
    assert read_manifest(sound / "plain").calibration == {}
    assert b"calibration" not in (sound / "plain" / "quantize8.json").read_bytes()


def test_other_loaders_see_no_difference(sound):
    models = []
    for name in ("plain", "out"):
        model, notes = AutoModelForCausalLM.from_pretrained(sound / name, device_map="cpu", output_loading_info=True)
        assert not any(notes[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), notes
        models.append(model.eval())
    assert torch.equal(*map(logits, models))


def test_mode_hybrid_is_the_default_and_nearer_to_the_source(sound):
    model, _ = load(sound / "out", "cpu")
    layers = [module for module in model.modules() if isinstance(module, Int8Linear)]
    assert {layer.mode for layer in layers} == {"hybrid"} and len(layers) == 15  # with the output head
    assert all(layer.outlier_columns is not None for layer in layers)
    exact = logits(load(sound / "source", "cpu")[0])
    found = {mode: logits(load(sound / "out", "cpu", mode=mode)[0]) for mode in ("hybrid", "dynamic")}
    found["static"] = logits(in_mode(load(sound / "out", "cpu")[0], "static"))
    errors = {mode: (found[mode] - exact).norm() for mode in found}
    assert torch.equal(logits(model), found["hybrid"])
    assert errors["hybrid"] <= errors["static"] < errors["dynamic"]
    assert torch.equal(*(logits(load(sound / name, "cpu", mode="dynamic")[0]) for name in ("plain", "out")))
    assert {module.mode for module in load(sound / "plain", "cpu")[0].modules() if isinstance(module, Int8Linear)} == {
        "dynamic"
    }


@pytest.mark.parametrize("options", [{"scheme": "w8a8"}, {"scheme": "w8a16"}], ids=["w8a8", "w8a16"])
def test_compressed_tensors_artifacts_are_calibrated_alike(options, sound, tmp_path):
    out = tmp_path / "out"
    convert(str(sound / "source"), out, format="compressed-tensors", calibrate=sound / "text", **options)
    verify(out)
    model, _ = load(out, "cpu")
    assert model.get_submodule(MODULE).mode == "hybrid" and len(model.get_submodule(MODULE).outlier_columns) == 8
    theirs, ours = load_file(out / OUTLIERS_NAME), load_file(sound / "out" / OUTLIERS_NAME)
    assert all(torch.equal(value, ours[name]) for name, value in theirs.items())
    quantized, notes = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(notes[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), notes
    assert logits(quantized.eval()).isfinite().all()


def test_a_calibrated_artifact_is_a_source_like_any_other(sound, artifact, tmp_path):
    convert(str(artifact), tmp_path / "float", format="float16")
    convert(str(artifact), tmp_path / "w8a16", format="compressed-tensors", scheme="w8a16")
    convert(str(artifact), tmp_path / "again", calibrate=sound / "text", recipe="int8-all")
    for name in ("float", "w8a16"):
        assert not (tmp_path / name / OUTLIERS_NAME).exists()
        assert not [key for key in open_checkpoint(str(tmp_path / name)).tensors if "outlier" in key]
    for module, entry in read_outliers(tmp_path / "again").items():
        assert len(entry.columns) and not entry.weight.size, module  # what is int8 already has nothing to lose


def test_names_of_a_checkpoint_without_its_models_prefix(tmp_path):
    """The hub's gpt2 stores h.0... where the model has transformer.h.0...; its Conv1D weights are transposed."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=64, n_positions=128)).half().eval()
    source = tmp_path / "source"
    model.save_pretrained(source)
    state = {name.removeprefix("transformer."): value.contiguous() for name, value in model.state_dict().items()}
    del state["lm_head.weight"]
    save_file(state, source / "model.safetensors")
    (tmp_path / "text").write_text(TEXT)
    convert(str(word_tokenizer(source)), tmp_path / "out", calibrate=tmp_path / "text", outlier_columns=2)
    found = read_outliers(tmp_path / "out")
    weights = [name for name, value in state.items() if ".c_" in name and value.dim() > 1]
    assert set(found) == {name.removesuffix(".weight") for name in weights}
    loaded, _ = load(tmp_path / "out", "cpu")
    for name, entry in found.items():
        assert torch.equal(torch.from_numpy(entry.weight), state[f"{name}.weight"].t()[:, entry.columns.tolist()])
        assert loaded.get_submodule(f"transformer.{name}").outlier_columns.tolist() == entry.columns.tolist()
    assert (logits(loaded) - logits(model.float())).norm() / logits(model.float()).norm() < 0.05


def test_experts_are_not_calibrated_and_find_what_stands_out_of_each_token(tmp_path):
    source = word_tokenizer(mixtral(tmp_path / "source"))
    (tmp_path / "text").write_text(TEXT)
    convert(str(source), tmp_path / "out", format="compressed-tensors", scheme="w8a16", calibrate=tmp_path / "text")
    assert {name.split(".")[3] for name in read_outliers(tmp_path / "out")} == {"self_attn"}
    model, _ = load(tmp_path / "out", "cpu", mode="hybrid")
    layers = {name: each for name, each in model.named_modules() if isinstance(each, Int8Linear)}
    assert {each.mode for each in layers.values()} == {"hybrid"}
    stored = {name.split(".")[3]: each.outlier_columns is not None for name, each in layers.items()}
    assert stored == {"self_attn": True, "mlp": False}
    assert logits(model).isfinite().all()


@pytest.mark.parametrize(("columns", "stored"), [(0, 0), (5, 5), ("5", 5), (1000, 64)])
def test_a_number_of_columns(columns, stored, sound, tmp_path):
    convert(str(sound / "source"), tmp_path / "out", calibrate=sound / "text", outlier_columns=columns)
    entry = read_outliers(tmp_path / "out")[MODULE]
    assert entry.columns.shape == (stored,) and entry.weight.shape == (48, stored)
    verify(tmp_path / "out")
    assert read_manifest(tmp_path / "out").calibration["outlier_columns"] == int(columns)
    assert logits(load(tmp_path / "out", "cpu")[0]).isfinite().all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"outlier_columns": 5}, "add --calibrate FILE"),
        ({"outlier_columns": "0"}, "add --calibrate FILE"),
        ({"calibrate": "text", "outlier_columns": "many"}, "outlier-columns many: must be auto, or a number"),
        ({"calibrate": "text", "outlier_columns": -1}, "outlier-columns -1: must be auto, or a number"),
        ({"calibrate": "text", "outlier_columns": "1.5"}, "outlier-columns 1.5: must be auto"),
        ({"calibrate": "text", "format": "gguf"}, "--format gguf does not store outlier columns"),
        ({"calibrate": "text", "format": "float16"}, "--format float16 does not store outlier columns"),
        ({"calibrate": "missing"}, "missing: cannot be read as text"),
        ({"calibrate": "empty"}, "empty: is empty"),
    ],
)
def test_arguments_that_are_wrong(options, message, sound, tmp_path, monkeypatch):
    monkeypatch.chdir(sound)
    (sound / "empty").write_text(" \n")
    with pytest.raises((OutputError, SourceError), match=message) as caught:
        convert(str(sound / "source"), tmp_path / "out", **options)
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()


def test_a_dry_run_does_not_calibrate_and_says_so(sound, tmp_path, monkeypatch):
    monkeypatch.setattr("quantize8.calibration.calibrate.calibrate", lambda *_, **__: pytest.fail("calibrated"))
    options = {"calibrate": sound / "text", "recipe": "int8-all", "dry_run": True}
    result = convert(str(sound / "source"), tmp_path / "out", **options)
    assert result.to_calibrate and result.plan.outliers is None and not list(tmp_path.iterdir())
    console = Console(width=160)
    with console.capture() as shown:
        console.print(reports.conversion(result))
    assert "is made from the text when the conversion runs, not in this plan" in shown.get()


def test_the_plan_knows_the_size_of_both_files(sound, tmp_path):
    options = {"calibrate": sound / "text", "recipe": "int8-all"}
    plan = convert(str(sound / "source"), tmp_path / "out", **options).plan
    sizes = {path.name: path.stat().st_size for path in (sound / "out").glob("*.safetensors")}
    assert {shard.file: shard.nbytes for shard in plan.files} == sizes and plan.output_bytes == sum(sizes.values())


def edit(change):
    """Change the tensors of an artifact's outlier file."""

    def damage(folder):
        tensors = load_file(folder / OUTLIERS_NAME)
        change(tensors)
        save_file(tensors, folder / OUTLIERS_NAME)

    return damage


def columns_of(*columns: int, dtype=torch.int32):
    return edit(lambda tensors: tensors.__setitem__(f"{MODULE}.outlier_columns", torch.tensor(columns, dtype=dtype)))


def value(last: str, new: torch.Tensor, module: str = MODULE):
    return edit(lambda tensors: tensors.__setitem__(f"{module}.{last}", new))


def without(last: str):
    return edit(lambda tensors: tensors.pop(f"{MODULE}.{last}"))


def rename(tensors):
    for name in [name for name in tensors if name.startswith(f"{MODULE}.")]:
        tensors[name.replace(MODULE, "model.layers.7.mlp.up_proj")] = tensors.pop(name)


def cut(folder):
    path = folder / OUTLIERS_NAME
    path.write_bytes(path.read_bytes()[:-1])


def link_outside(folder):
    target = shutil.copy(folder / OUTLIERS_NAME, folder.parent / "elsewhere.safetensors")
    (folder / OUTLIERS_NAME).unlink()
    (folder / OUTLIERS_NAME).symlink_to(target)


WRONG, OTHER, FIT = "lists invalid outlier columns", "does not have the tensors of a calibration", "fit no int8 layer"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        pytest.param(cut, "not a whole safetensors file", id="cut"),
        pytest.param(lambda folder: (folder / OUTLIERS_NAME).write_bytes(b""), "not a whole safetensors", id="empty"),
        pytest.param(link_outside, "points outside its model folder", id="link"),
        pytest.param(columns_of(1, 2, 3, 1, 4, 5, 6, 7), WRONG, id="twice"),
        pytest.param(columns_of(1, 2, 3, 64, 4, 5, 6, 7), WRONG, id="beyond"),
        pytest.param(columns_of(1, 2, 3, -1, 4, 5, 6, 7), WRONG, id="negative"),
        pytest.param(columns_of(), WRONG, id="more stored than listed"),
        pytest.param(columns_of(1, 2, 3, dtype=torch.int64), OTHER, id="int64"),
        pytest.param(value("outlier_columns", torch.tensor(3, dtype=torch.int32)), OTHER, id="no dimension"),
        pytest.param(value("outlier_columns", torch.zeros(2, 2, dtype=torch.int32)), OTHER, id="two dimensions"),
        pytest.param(value("outlier_weight", torch.zeros(48, 9, dtype=torch.float16)), WRONG, id="E > J"),
        pytest.param(value("outlier_weight", torch.zeros(48, 1)), OTHER, id="float32"),
        pytest.param(value("outlier_weight", torch.full((48, 1), torch.nan).half()), WRONG, id="NaN"),
        pytest.param(value("outlier_weight", torch.zeros(47, 1, dtype=torch.float16)), FIT, id="another N"),
        pytest.param(value("input_absmax", torch.zeros(65)), WRONG, id="another K here"),
        pytest.param(value("other", torch.zeros(1)), OTHER, id="a foreign tensor"),
        pytest.param(edit(lambda tensors: tensors.__setitem__("alone", torch.zeros(1))), OTHER, id="no module"),
        pytest.param(without("outlier_columns"), OTHER, id="no columns"),
        pytest.param(without("outlier_weight"), OTHER, id="no weight"),
        pytest.param(without("input_mean_square"), OTHER, id="no mean square"),
        pytest.param(edit(rename), FIT, id="a foreign module"),
    ],
)
def test_a_file_that_lies_is_refused_in_one_line(damage, message, artifact):
    damage(artifact)
    with pytest.raises((ArtifactError, SourceError), match=message) as caught:
        load(artifact, "cpu")
    assert "\n" not in str(caught.value)
    with pytest.raises(ArtifactError) as caught:
        verify(artifact)
    assert "\n" not in str(caught.value)
    if message != "points outside its model folder":
        load(artifact, "cpu", mode="dynamic")  # which does not read it


def test_verify_counts_the_file_and_finds_a_flipped_bit_in_each_of_its_tensors(sound, artifact):
    result = verify(artifact)
    others = [path.stat().st_size for path in artifact.iterdir() if path.name != "quantize8.json"]
    assert (result.nbytes, result.files) == (sum(others), len(others))
    path = artifact / OUTLIERS_NAME
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    for name, entry in json.loads(data[8 : 8 + length]).items():
        if name != "__metadata__" and entry["data_offsets"][0] < entry["data_offsets"][1]:
            changed = bytearray(data)
            changed[8 + length + entry["data_offsets"][0]] ^= 1
            path.write_bytes(changed)
            with pytest.raises(ArtifactError):
                verify(artifact)
    path.write_bytes(data)
    assert verify(artifact) == result


def test_verify_finds_the_file_missing_or_where_none_belongs(sound, artifact, tmp_path):
    (artifact / OUTLIERS_NAME).unlink()
    with pytest.raises(ArtifactError, match=f"{OUTLIERS_NAME}: missing"):
        verify(artifact)
    plain = shutil.copytree(sound / "plain", tmp_path / "plain")
    shutil.copy(sound / "out" / OUTLIERS_NAME, plain)
    with pytest.raises(ArtifactError, match=f"{OUTLIERS_NAME}: is not part of the artifact"):
        verify(plain)


def test_a_hub_model_comes_with_its_outliers():
    names = ["config.json", "model.safetensors", "model.safetensors.index.json", OUTLIERS_NAME, "README.md"]
    weights, _ = needed_files(names)
    assert set(weights) >= {OUTLIERS_NAME, "model.safetensors"}


def test_saving_a_calibrated_model_leaves_its_columns_behind(artifact, tmp_path):
    model, _ = load(artifact, "cpu")
    expected = logits(load(artifact, "cpu", mode="dynamic")[0])
    logits(model)
    assert not [name for name in model.state_dict() if "outlier" in name]
    model.save_pretrained(tmp_path / "saved")
    assert [path.name for path in (tmp_path / "saved").glob("*.safetensors")] == ["model.safetensors"]
    assert not [name for name in load_file(tmp_path / "saved" / "model.safetensors") if "outlier" in name]
    config = (tmp_path / "saved" / "config.json").read_text()
    assert "static" not in config and "hybrid" not in config
    torch.testing.assert_close(logits(load(tmp_path / "saved", "cpu")[0]), expected)


def test_run_and_evaluate_take_a_mode(sound):
    source, out, plain = (str(sound / name) for name in ("source", "out", "plain"))
    prompt = " ".join(f"w{i}" for i in range(20))
    found = run(out, prompt, max_new_tokens=4, compare=source, device="cpu", mode="hybrid")
    assert isinstance(found, Comparison) and found.agreement.kl >= 0
    options = {"text": sound / "text", "device": "cpu"}
    default, hybrid, dynamic = (evaluate(out, mode=mode, **options) for mode in (None, "hybrid", "dynamic"))
    assert default.perplexity == hybrid.perplexity != dynamic.perplexity
    assert evaluate(plain, mode="dynamic", **options).perplexity == dynamic.perplexity
    for operation in (lambda: evaluate(out, mode="static", **options), lambda: run(out, "w1", mode="static")):
        with pytest.raises(SourceError, match=r"^mode static: unknown; name one of hybrid, dynamic, bitsandbytes$"):
            operation()


LENGTHS = (1, 5, 16, 17, 40)


@pytest.mark.parametrize("mode", ["static", "hybrid"])
def test_a_sequence_has_the_same_logits_alone_and_in_a_batch(mode, tmp_path, monkeypatch):
    """To the last bit, with an int8 output head, too, and an inner width that is a multiple of 32.

    torch computes SiLU in vectors of 32 numbers, and treats the rest of a tensor differently.
    """
    monkeypatch.setattr("helpers.making.INNER", 64)
    model = in_mode(load(made(tmp_path, recipe="int8-all")[1], "cpu")[0], mode)
    for length in LENGTHS:
        ids = torch.arange(8 * length).view(8, length) * 7 % 60
        together = logits(model, ids)
        for i in range(8):
            assert torch.equal(logits(model, ids[i : i + 1])[0], together[i]), (length, i)


def test_in_mode_dynamic_a_neighbours_outlier_shows(sound, tmp_path):
    def edit(state):
        state["model.embed_tokens.weight"][50:, 5] = 100  # of some tokens only

    source = llama(tmp_path / "source", hidden=64, edit=edit)
    convert(str(source), tmp_path / "out")
    ids = torch.arange(80).view(2, 40) % 40
    ids[1, 7] = 55
    for mode, same in (("dynamic", False), ("hybrid", True)):
        model, _ = load(tmp_path / "out", "cpu", mode=mode)
        with torch.inference_mode():
            together, alone = model.model(ids)[0], model.model(ids[:1])[0]
        assert torch.equal(together[:1], alone) == same


@pytest.fixture(scope="module")
def calibrated(smollm2, tmp_path_factory):
    """The real model, and some ids."""
    folder = tmp_path_factory.mktemp("calibrated")
    (folder / "text").write_text(ADDRESS.read_text()[:500])
    convert(str(smollm2), folder / "out", calibrate=folder / "text")
    model, tokenizer = load(folder / "out", "cpu")
    return model, tokenizer(ADDRESS.read_text()[2000:6000], return_tensors="pt")["input_ids"][0]


@pytest.mark.parametrize("mode", ["static", "hybrid"])
def test_the_real_model_has_the_same_states_alone_and_in_a_batch(mode, calibrated):
    """Up to the output head: that is the embedding, in floating point, and BLAS adds in another order for few rows."""
    model, text = calibrated
    in_mode(model, mode)
    for length in LENGTHS:
        ids = text[: 8 * length].view(8, length)
        with torch.inference_mode():
            together, alone = model.model(ids)[0], model.model(ids[3:4])[0]
            assert torch.equal(together[3:4], alone), length
            torch.testing.assert_close(model.lm_head(together)[3:4], model.lm_head(alone), atol=1e-3, rtol=1e-3)
