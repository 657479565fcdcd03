"""The documentation agrees with the code: commands, options, numbers, names, links and versions."""

import ast
import json
import re
import shlex
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import typer

import quantize8
from quantize8.artifact.manifest import Manifest, Quantized, TensorRecord
from quantize8.cli import app
from quantize8.files import resource_dir
from quantize8.formats import FORMATS, Scheme, bitsandbytes
from quantize8.formats.bitsandbytes import BitsAndBytes
from quantize8.formats.compressed_tensors import CompressedTensors
from quantize8.kernels import reference
from quantize8.recipe import load_recipe
from quantize8.sources import quantized
from quantize8.sources.structure import LINEAR

ROOT = Path(__file__).parent.parent
CLI = typer.main.get_command(app)
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
REPOSITORY = "https://github.com/quantize8/quantize8/"
USER_PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def fenced(page: Path, language: str = r"\w*") -> list[str]:
    """Contents of a page's fenced code blocks."""
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def commands() -> list[list[str]]:
    """Every `quantize8 ...` command line in a fenced code block, as words; lines ending in a backslash are joined."""
    found = []
    for page in USER_PAGES:
        for block in fenced(page):
            for line in block.replace("\\\n", " ").splitlines():
                line = line.removeprefix("$ ")
                if line.startswith("quantize8 "):
                    found.append(shlex.split(line, comments=True)[1:])
    return found


def long_options(command) -> list[str]:
    names = [name for param in command.params for name in (*param.opts, *param.secondary_opts)]
    return [name for name in names if name.startswith("--")]


def section(text: str, title: str) -> str:
    return re.split(r"^## ", text.partition(f"## {title}\n")[2], flags=re.MULTILINE)[0]


def first_cells(table: str) -> set[str]:
    """The names in backticks in the first column of a Markdown table."""
    rows = (line.split("|")[1] for line in table.splitlines() if line.startswith("| `"))
    return {name for row in rows for name in re.findall(r"`([^`]+)`", row)}


@pytest.mark.parametrize("name", sorted(CLI.commands))
def test_every_command_is_documented(name):
    assert any(re.search(rf"(quantize8 |`){name}\b", page.read_text(encoding="utf-8")) for page in USER_PAGES)


@pytest.mark.parametrize("command", [CLI, *CLI.commands.values()], ids=lambda command: command.name or "quantize8")
def test_every_option_is_documented(command):
    text = "\n".join(page.read_text(encoding="utf-8") for page in USER_PAGES)
    missing = [name for name in long_options(command) if not re.search(rf"(?<![\w-]){name}(?![\w-])", text)]
    assert not missing


def test_command_lines_parse():
    lines = commands()
    assert {words[0] for words in lines} >= {"convert", "inspect", "run", "verify", "demo"}
    for words in lines:
        if words[0] in CLI.commands:
            CLI.commands[words[0]].make_context(words[0], words[1:])  # raises on an option it does not know
        else:
            assert words[0] in long_options(CLI), words


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_options_named_in_the_text_exist(page):
    known = {name for command in (CLI, *CLI.commands.values()) for name in long_options(command)} | {"--help"}
    spans = re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```$", "", page.read_text("utf-8"), flags=re.M | re.S))
    own = [span for span in spans if not span.startswith(("pip ", "pytest ", "make "))]
    named = {name for span in own for name in re.findall(r"(?<![\w-])--[a-z][a-z-]*", span)}
    assert named <= known


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_make_targets_exist(page):
    targets = re.search(r"^\.PHONY: (.*)$", read("Makefile"), re.MULTILINE)[1].split()
    named = re.findall(r"(?:^|`|\d )make ([a-z]+)", page.read_text(encoding="utf-8"), re.MULTILINE)
    assert set(named) <= set(targets)


@pytest.mark.parametrize("page", USER_PAGES, ids=lambda page: page.name)
def test_python_examples_use_names_that_exist(page):
    for block in fenced(page, "python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "quantize8":
                assert node.attr in quantize8.__all__, node.attr


def test_recipes_are_documented_with_their_values():
    rows = re.findall(
        r"^\| `([\w-]+)`.*?\| ([\d.]+).*?\| (.*?) \|", section(read("README.md"), "Recipes"), re.MULTILINE
    )
    assert {name for name, _, _ in rows} == {path.stem for path in resource_dir("configs").glob("*.toml")}
    for name, threshold, head in rows:
        recipe = load_recipe(name)
        assert (recipe.threshold, recipe.output_head) == (float(threshold), head.startswith("int8")), name


def test_every_module_is_on_the_map():
    package = ROOT / "quantize8"
    paths = [path for path in package.rglob("*.py") if path.name != "__init__.py"]
    paths += [package / name / "__init__.py" for name in ("cli", "reports", "sources")]  # which have functions
    modules = {".".join(path.relative_to(package).with_suffix("").parts).removesuffix(".__init__") for path in paths}
    python, kernels = read("docs/modules.md").split("The C kernels are in")
    assert first_cells(python) == modules
    assert first_cells(kernels) == {path.name for path in (ROOT / "cpu").glob("*.[ch]")}


def example(name: str) -> list:
    """A matrix or vector of the worked example in docs/format.md, by its name there; "" is the weight."""
    text = section(read("docs/format.md"), "Worked example")
    found = re.search(rf"^    {f'{name} = ' if name else ''}(\[.*?\])$(?!\n     )", text, re.MULTILINE | re.DOTALL)
    return json.loads(found[1])


def test_worked_example():
    weight = np.array(example(""), np.float32)
    assert weight.shape == (2, 4) and not weight[1].any()
    codes, absmax = reference.quantize_rowwise(weight)
    assert codes.tolist() == example("weight")
    assert absmax.tolist() == example("SCB")
    assert reference.dequantize(codes, absmax).tolist() == example("dequantized")


def test_worked_example_shows_ties_and_float16_rounding():
    row = np.array(example("")[0], np.float32)
    products = reference.to_float16(row).astype(np.float32) * np.float32(128)
    assert products.tolist() == [127.0, -1.5, 2.5, 38.40625]
    assert str(float(np.float16(row[3]))) in read("docs/format.md")


def test_order_of_rounding_matters_as_documented():
    absmax, value = (
        float(number) for number in re.search(r"SCB ([\d.]+) and w\s+([\d.]+)", read("docs/format.md")).groups()
    )
    codes, found = reference.quantize_rowwise(np.array([[absmax, value]], np.float32))
    one_division = np.rint(np.float32(value) * (np.float32(127) / np.float32(absmax)))
    assert found.tolist() == [absmax] and codes[0, 1] == 63 and one_division == 64


def test_stored_fields_are_documented():
    text = read("docs/format.md")
    assert first_cells(section(text, "quantization_config")) == set(bitsandbytes.quantization_config(6.0, []))
    manifest = json.loads(Manifest("0", "bitsandbytes", {}, {}, 0).to_bytes())
    assert first_cells(section(text, "quantize8.json")) == set(manifest)
    for record in (TensorRecord, Quantized):
        for name in record.__dataclass_fields__:
            assert f"`{name}`" in section(text, "quantize8.json"), name
    stored = {tensor.name for tensor in BitsAndBytes().module_tensors("M", (2, 4), LINEAR)}
    assert first_cells(section(text, "Tensors of a quantized module `M` with a weight w [N, K]")) == stored


@pytest.mark.parametrize("scheme", get_args(Scheme))
def test_compressed_tensors_fields_are_documented(scheme):
    text = section(read("docs/formats.md"), "compressed-tensors")
    for tensor in CompressedTensors(scheme=scheme).module_tensors("M", (2, 4), LINEAR):
        assert f"`{tensor.name}`" in text


def test_every_format_and_source_is_documented():
    text = read("docs/formats.md")
    assert first_cells(section(text, "What convert writes")) == {"--format", *FORMATS}
    assert set(quantized._FORMATS) <= set(re.findall(r"`([\w-]+)`", section(text, "What convert reads")))


def links(page: Path) -> list[str]:
    """Targets of a page's links, written inline or as reference definitions."""
    text = page.read_text(encoding="utf-8")
    return re.findall(r"\]\(([^)]+)\)", text) + re.findall(r"^\[[^\]]+\]: (\S+)$", text, re.MULTILINE)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_relative_links_lead_somewhere(page):
    for target in links(page):
        if not re.match(r"https?://|mailto:", target):
            path, _, anchor = target.partition("#")
            assert (page.parent / path).exists() and not anchor, target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_absolute_links_into_the_repository_lead_somewhere(page):
    for target in links(page):
        if target.startswith(REPOSITORY):
            kind, path = re.fullmatch(r"(blob|tree)/main/([^#]+)", target.removeprefix(REPOSITORY)).groups()
            assert (ROOT / path).is_file() if kind == "blob" else (ROOT / path).is_dir(), target


def test_the_readme_has_absolute_links_alone():
    """PyPI shows the README too, and there a relative link leads nowhere."""
    text, targets = read("README.md"), links(ROOT / "README.md")
    assert any(target.startswith(REPOSITORY) for target in targets)
    assert [target for target in targets if not target.startswith("https://")] == []
    defined = set(re.findall(r"^\[([^\]]+)\]: ", text, re.MULTILINE))
    assert set(re.findall(r"\]\[([^\]]+)\]", text)) == defined


def test_version_has_a_section_in_the_changelog():
    assert re.search(rf"^## \[{re.escape(quantize8.__version__)}\]", read("CHANGELOG.md"), re.MULTILINE)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_lines_are_at_most_120_characters(page):
    assert max(len(line) for line in page.read_text(encoding="utf-8").splitlines()) <= 120
