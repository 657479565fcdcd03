"""HTML pages: complete, without scripts or requests, every name escaped, deterministic, and with all results."""

import json
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from helpers.making import llama, mixtral, qwen3_moe
from test_cli import quantize8  # noqa: F401

from quantize8 import cli
from quantize8.commands.convert import convert
from quantize8.commands.evaluate import Agreement, Divergence, Estimate, Evaluation, Positions
from quantize8.commands.inspect import WeightReport, inspect
from quantize8.errors import DependencyError, OutputError
from quantize8.reports.pages import markup, names
from quantize8.reports.pages.build import check, page, write

EVIL = "model.layers.0.</style><script>alert(1)</script>&amp;\"'.q_proj"
VOID = {"meta"}
LOADING = {"src", "href", "xlink:href", "srcset", "data", "action", "poster", "background", "http-equiv"}


class Reader(HTMLParser):
    """Checks that tags nest, and gathers what a test asks for."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[str] = []
        self.loads: list[str] = []
        self.ids: list[str] = []
        self.rows: list[list[str]] = []
        self.text = ""

    def handle_starttag(self, tag, attrs):
        self.handle_startendtag(tag, attrs)
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        for key, value in attrs:
            assert not key.startswith("on"), key
            if key == "id":
                self.ids.append(value)
            if key in LOADING:
                self.loads.append(value)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1][-1] += data


def read(data: bytes) -> Reader:
    """A page, of which holds what is promised of each."""
    content = data.decode()
    reader = Reader()
    reader.feed(content)
    reader.close()
    assert not reader.open and content.startswith("<!DOCTYPE html>")
    assert not {"script", "link", "iframe", "object", "embed", "base", "form", "style>"} & set(reader.tags)
    assert reader.tags.count("style") == reader.tags.count("title") == reader.tags.count("h1") == 1
    assert len(set(reader.ids)) == len(reader.ids)
    own = [load for load in reader.loads if load.startswith(("#", "data:image/png;base64,"))]
    assert [load for load in reader.loads if load not in own] == ["Content-Security-Policy"]
    (style,) = re.findall(r"<style>(.*?)</style>", content, re.DOTALL)
    assert "@import" not in style and "url(" not in style and "http" not in content.replace("http-equiv", "")
    assert "default-src 'none'" in content and "prefers-color-scheme: dark" in style and "@media print" in style
    return reader


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    return convert(str(llama(folder / "source")), folder / "out")


def report(module: str, error: float | None = 0.01, outliers: int = 3) -> WeightReport:
    return WeightReport(module, "F16", (8, 16), 1.5, 0.1, outliers, error, [(5, outliers, 1.5)])


def dots(data: bytes) -> int:
    """Points of all lines."""
    return sum(part.count("<use") for part in re.findall(r'-series-\d+">(.*?)</g>\s*</g>', data.decode(), re.DOTALL))


def test_a_conversion_shows_sizes_errors_and_what_was_kept(converted):
    data = page(converted, "source")
    reader = read(data)
    assert len(data) < 200_000
    assert dots(data) == len(converted.errors) == 14
    rows = {row[0]: row for row in reader.rows}
    for name, entry in converted.errors.items():
        row = rows[name.removesuffix(".weight")]
        assert row[2] == f"{entry.relative_error:.4f}" and row[4] == f"{entry.outliers:,}"
    assert rows["lm_head"] == ["lm_head", "64x32", "output head"]
    worst = max(converted.errors.values(), key=lambda entry: entry.relative_error)
    mean = np.mean([entry.relative_error for entry in converted.errors.values()])
    assert f"{worst.relative_error:.4f}" in reader.text and f"{mean:.4f}" in reader.text
    assert "quantize8 verify" in reader.text


def test_sizes_by_part_add_up_to_the_files(converted, tmp_path):
    from quantize8.reports.pages.weights import _stored, _written

    experts = convert(str(mixtral(tmp_path / "mixtral")), tmp_path / "a", format="compressed-tensors", dry_run=True)
    int8 = convert(str(converted.out), tmp_path / "b", format="compressed-tensors", dry_run=True)
    for result in (converted, experts, int8):
        plan = result.plan
        assert sum(_stored(plan).values()) == plan.source_bytes
        assert sum(_written(plan).values()) == plan.output_bytes - sum(len(shard.header) for shard in plan.shards)
    assert _written(converted.plan)["attention"] * 2 == _stored(converted.plan)["attention"]  # float16 to int8
    assert set(_stored(int8.plan)) >= {"scales"} and _written(experts.plan)["experts"] == 2 * 4 * 3 * 32 * 48


def test_a_dry_run_a_plain_format_and_carried_codes_have_a_page(converted, tmp_path):
    source = str(converted.plan.checkpoint.folder)
    planned = read(page(convert(source, tmp_path / "a", dry_run=True), source))
    assert "Plan of a conversion" in planned.text and "without --dry-run" in planned.text
    plain = read(page(convert(str(converted.out), tmp_path / "b", format="bfloat16"), "x"))
    assert plain.tags.count("figure") == 1
    carried = convert(str(converted.out), tmp_path / "c", format="compressed-tensors")
    data = page(carried, "x")
    assert "those of the source" in read(data).text and dots(data) == 0


def test_experts_are_a_median_and_a_band(tmp_path):
    result = convert(str(qwen3_moe(tmp_path / "moe")), tmp_path / "out", format="compressed-tensors")
    data = page(result, "moe")
    assert "such as experts" in read(data).text and "-band-0" in data.decode()
    assert dots(data) == 2 * (4 + 3)  # layers, q k v o, gate up down


def test_weights_show_each_module_once_and_the_worst_columns(converted):
    reports = inspect(str(converted.out))
    data = page(reports, str(converted.out))
    reader = read(data)
    assert dots(data) == len(reports) == 14
    assert [row[0] for row in reader.rows[1:]] == sorted((entry.module for entry in reports), key=names.natural)
    assert "Weights of out" in reader.text and "stored as I8" in reader.text
    assert page(reports, str(converted.out)) == data  # the same bytes


def test_a_second_conversion_has_the_same_page(converted, tmp_path):
    again = convert(str(converted.plan.checkpoint.folder), converted.out, overwrite=True)
    assert page(again, "x") == page(converted, "x")


@pytest.mark.parametrize("name", [EVIL, "model.layers.1.\x00\x1b[2J\udc80", "模型.layers.0.层", "0", "$x^2$", ""])
def test_hostile_names_are_text(name):
    reader = read(page([report(name)], name))
    shown = names.plain(name)
    assert reader.rows[1][0] == shown and shown in reader.text


def test_hostile_models_texts_and_folders_are_text():
    none = Estimate(20.0, None, None)
    kl = Divergence(0.1, None, 0.1, 0.2, 0.3, [Positions(1, 9, 0.1)])
    agreement = Agreement(EVIL, none, Estimate(1.1, None, None), kl, 0.9, {EVIL: 0.1})
    reader = read(page(Evaluation(EVIL, 10, 9, 10, none, agreement), "x"))
    assert EVIL in reader.text and "Too few tokens" in reader.text


@pytest.mark.parametrize(
    "reports",
    [
        [report("lm_head")],
        [report("model.layers.3.q_proj", 0.0, 0)],
        [report("model.layers.0.q_proj", None)],
        [report(f"model.layers.{i}.mlp.up_proj", 0.0, 0) for i in range(3)],
        [report(f"{stack}.block.0.layer.{i}.SelfAttention.q") for stack in ("encoder", "decoder") for i in range(2)],
    ],
)
def test_few_or_empty_numbers_have_a_page(reports):
    read(page(reports, "model"))


def test_a_layer_that_stands_out_is_named_with_a_recipe():
    reports = [report(f"model.layers.{i}.q_proj", 0.05 if i == 4 else 0.01) for i in range(9)]
    reader = read(page(reports, "model"))
    assert 'skip = ["model.layers.4.q_proj"]' in reader.text
    assert "No layer is an outlier" in read(page(reports[:4], "model")).text


def test_a_page_of_very_many_modules_stays_small():
    """As many as 48 layers of 128 experts have; the table holds the worst thousand."""
    experts = [
        f"model.layers.{i}.mlp.experts.{j}.{k}_proj" for i in range(48) for j in range(128) for k in ("down", "up")
    ]
    reports = [report(name, 0.01 + 1e-7 * i) for i, name in enumerate(experts)]
    data = page(reports, "model")
    reader = read(data)
    assert len(data) < 500_000 and dots(data) == 2 * 48
    assert len(reader.rows) == 1 + 1000 and reader.rows[-1][0] == experts[-1]
    assert "1,000 of 12,288 modules; --json lists all" in reader.text


def evaluation(low: float | None, high: float | None, layers: int) -> Evaluation:
    kl = Divergence(0.0143, 0.0007, 0.0081, 0.09, 0.7, [Positions(1 + 16 * i, 32, 0.01 + 0.001 * i) for i in range(64)])
    states = {f"model.layers.{i}": 0.01 * i for i in range(layers)}
    agreement = Agreement("source", Estimate(22.1, 19.0, 25.0), Estimate(1.027, low, high), kl, 0.935, states)
    return Evaluation("int8", 2048, 2046, 1024, Estimate(22.72, 19.8, 26.0), agreement)


def test_an_evaluation_shows_its_figures_and_says_what_they_mean():
    data = page(evaluation(1.017, 1.038, 30), "int8")
    reader = read(data)
    for shown in ("22.720", "19.800 to 26.000", "1.0270", "0.01430", "0.00070", "93.5%", "more than chance"):
        assert shown in reader.text, shown
    assert dots(data) == 64 + 30 and ["99th percentile", "0.09000"] in reader.rows
    assert "may be chance" in read(page(evaluation(0.99, 1.06, 0), "int8")).text
    alone = Evaluation("int8", 2048, 2046, 1024, Estimate(22.72, 19.8, 26.0))
    assert "--reference SOURCE" in read(page(alone, "int8")).text


@pytest.fixture(scope="module")
def activated(tmp_path_factory):
    """Real activations of a tiny model, whose norms before attention make one feature large."""
    import torch
    from transformers import AutoModelForCausalLM

    from quantize8.calibration.activations import activations
    from quantize8.calibration.advice import recommend

    def outlier(state):
        for layer in range(2):
            state[f"model.layers.{layer}.input_layernorm.weight"][5] = 40

    folder = llama(tmp_path_factory.mktemp("text") / "source", edit=outlier)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    found = activations(model, torch.arange(40) % 64, 6.0)
    found.advice = recommend(found)
    return found


def test_activations_show_features_thresholds_and_each_module(activated):
    data = page(activated, "model")
    reader = read(data)
    assert activated.features.columns and activated.emergent  # the page is about something
    assert activated.advice.reason in reader.text
    rows = {row[0]: row for row in reader.rows}
    for entry in activated.linears:
        assert rows[entry.module][2] == str(len(entry.columns)) and rows[entry.module][4] == f"{entry.max:.1f}"
    for entry in activated.thresholds:
        assert rows[f"{entry.threshold:g}"][1:3] == [f"{entry.error:.4f}", f"{entry.columns:,}"]
    joined = 2 * (2 + 2)  # max |x| of two layers: q k v as one, o; gate up as one, down
    assert dots(data) == 4 * len(activated.thresholds) + 14 + joined
    assert page(activated, "model") == data


@pytest.mark.parametrize("calibrates", [True, False])
def test_the_command_that_is_advised_is_shown(activated, calibrates):
    from dataclasses import replace

    advised = replace(activated, advice=replace(activated.advice, calibrate=calibrates))
    option = "--calibrate FILE" if calibrates else f"--threshold {activated.advice.threshold:g}"
    assert f"Convert with quantize8 convert SOURCE {option}" in read(page(advised, "model")).text


def test_the_map_of_features_is_drawn_cell_by_cell(activated):
    from test_plots import parse, pixels

    content = page(activated, "model").decode()
    (svg,) = re.findall(r"<h2>Outlier features</h2>.*?(<svg.*?</svg>)", content, re.DOTALL)
    cells = pixels(parse(svg))[0][..., 3]
    shares = np.array(activated.features.share).T
    assert cells.shape == shares.shape and np.array_equal(cells > 0, shares > 0)
    assert cells.flat[shares.argmax()] == 1


def test_the_first_position_is_shown_apart_where_it_differs(activated):
    from dataclasses import replace

    linears = [replace(entry, max=1000.0) if "down" in entry.module else entry for entry in activated.linears]
    text = read(page(replace(activated, linears=linears), "m")).text
    assert "Largest |x| after position 0 in feed-forward" in text and "position 0 in attention" not in text


def test_few_or_empty_activations_have_a_page(activated):
    from dataclasses import replace

    bare = replace(activated, emergent=[], features=None, thresholds=[], advice=None)
    assert "No feature is emergent" in read(page(bare, "model")).text
    head = [entry for entry in activated.linears if entry.module == "lm_head"]
    assert len(head) == 1
    read(page(replace(bare, linears=head), EVIL))
    calm = [replace(entry, columns=[], max=0.0, max_after_first=0.0) for entry in activated.linears]
    read(page(replace(bare, linears=calm), "model"))


def test_the_command_line_writes_a_page_after_the_result(quantize8, tmp_path):  # noqa: F811
    source, file = llama(tmp_path / "source"), tmp_path / "a page.html"
    code, text, err = quantize8("convert", source, "--out", tmp_path / "out", "--report", file)
    assert (code, err) == (0, "") and "14 layers" in text
    first = file.read_bytes()
    assert "Conversion of source" in read(first).text
    code, text, _ = quantize8("inspect", tmp_path / "out", "--report", file, "--json")
    assert code == 0 and len(json.loads(text)) == 14  # nothing but the JSON
    assert "Weights of out" in read(file.read_bytes()).text  # in place of the first
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a page.html", "out", "source"]


@pytest.mark.parametrize(
    "name", ["out.json", "model.safetensors", "missing/page.html", "folder.html", "file/page.html"]
)
def test_a_page_that_cannot_be_written_is_refused_before_the_work(quantize8, tmp_path, name, monkeypatch):  # noqa: F811
    (tmp_path / "folder.html").mkdir()
    (tmp_path / "file").write_text("x")
    before = sorted(tmp_path.rglob("*"))
    for command in ("convert", "inspect", "evaluate"):
        code, text, err = quantize8(command, tmp_path / "no model", "--report", tmp_path / name)
        assert code == 1 and text == "" and err.count("\n") == 1 and name in err and "--report" in err
    assert sorted(tmp_path.rglob("*")) == before


def test_a_page_is_not_put_into_an_artifact(converted):
    with pytest.raises(OutputError, match="is inside an artifact"):
        check(converted.out / "page.html")


def test_a_failed_command_leaves_the_old_page(quantize8, tmp_path):  # noqa: F811
    file = tmp_path / "page.html"
    file.write_text("old")
    assert quantize8("inspect", tmp_path / "nothing", "--report", file)[0] == 1
    assert file.read_text() == "old" and list(tmp_path.iterdir()) == [file]


def test_a_page_that_cannot_be_finished_leaves_nothing(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(OutputError, match="No space left"):
        write(tmp_path / "page.html", [report("model.layers.0.q_proj")], "model")
    assert not list(tmp_path.iterdir())


def test_without_matplotlib_the_remedy_is_named_before_the_work(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(DependencyError, match="matplotlib"):
        check(tmp_path / "page.html")
    check(None)
    write(None, [], "")


def test_names_of_common_architectures_are_told_apart():
    bert = ["attention.self.query", "attention.output.dense", "intermediate.dense", "output.dense"]
    kinds = names.kinds([f"bert.encoder.layer.{i}.{end}" for i in range(2) for end in bert])
    assert len(set(kinds.values())) == 4 and kinds["bert.encoder.layer.1.attention.self.query"] == "query"
    stacks = names.kinds(["encoder.block.0.q", "decoder.block.0.q", "decoder.block.0.k"])
    assert stacks == {"encoder.block.0.q": "encoder q", "decoder.block.0.q": "decoder q", "decoder.block.0.k": "k"}
    parts = {
        "transformer.h.0.attn.c_proj": "attention", "transformer.h.0.mlp.c_proj": "feed-forward",
        "transformer.h.0.ln_1.weight": "norms", "transformer.wte.weight": "embeddings", "lm_head": "output head",
        "model.layers.1.mlp.experts.7.up_proj": "experts", "model.layers.1.mlp.gate.weight": "routers",
        "model.layers.1.mlp.gate_proj": "feed-forward", "model.layers.0.self_attn.q_norm.weight": "norms",
        "model.layers.1.block_sparse_moe.gate": "routers", "visual": "other",
    }  # fmt: skip
    assert {name: names.part(name) for name in parts} == parts
    assert names.layer("model.layers.12.q") == 12 and names.layer("lm_head") is None
    assert sorted(["a.10.b", "a.9.b", "a.x"], key=names.natural) == ["a.x", "a.9.b", "a.10.b"]


def test_pieces_of_a_page_escape_their_text():
    for piece in (
        markup.code(EVIL),
        markup.facts([(EVIL, EVIL)]),
        markup.figure(EVIL, EVIL, ""),
        markup.table(EVIL, [EVIL], [[EVIL]]),
    ):
        assert "<script" not in piece and "</style" not in piece


def test_help_of_the_commands_names_the_option():
    from inspect import signature

    for command in (cli.convert, cli.inspect, cli.evaluate):
        assert "page" in signature(command).parameters
