"""Rules for the project itself: public names, folders, and a wheel that works on its own."""

import ast
import platform
import re
import runpy
import subprocess
import sys
import sysconfig
import zipfile
from dataclasses import fields
from inspect import getdoc, isfunction, signature
from pathlib import Path

import pytest

import quantize8
from quantize8 import errors
from quantize8.files import resource_dir

ROOT = Path(quantize8.__file__).parent.parent
FUNCTIONS = [name for name in quantize8.__all__ if isfunction(getattr(quantize8, name))]
OPTIONS = [field.name for field in fields(quantize8.ConvertOptions)]
# The longest body has 46 lines and no function takes more than 8 parameters: about as much as fits on a screen, and as
# a caller can keep apart. The public operations, and the commands of their names, have a parameter for each option.
MOST_LINES, MOST_PARAMETERS = 50, 8


def test_public_names_are_sorted_importable_and_documented():
    classes = [name for name, value in vars(errors).items() if isinstance(value, type)]
    assert quantize8.__all__ == sorted(quantize8.__all__) and len(set(quantize8.__all__) - set(classes)) <= 13
    for name in quantize8.__all__:
        assert (getattr(quantize8, name).__doc__ or "").strip(), name
    assert set(quantize8.__all__) <= set(dir(quantize8))
    with pytest.raises(AttributeError, match="nonsense"):
        _ = quantize8.nonsense


def described(documented, section: str) -> list[str]:
    """The names that a section of a Google-style docstring describes, in order."""
    _, _, rest = getdoc(documented).partition(f"\n{section}:\n")
    return re.findall(r"^    (\w+): \S", re.split(r"^\w", rest, maxsplit=1, flags=re.MULTILINE)[0], re.MULTILINE)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_public_functions_document_each_parameter(name):
    """Those that take the fields of ConvertOptions leave these to its docstring."""
    function, names = getattr(quantize8, name), list(signature(getattr(quantize8, name)).parameters)
    own = [name for name in names if not (set(names) >= set(OPTIONS[1:]) and name in OPTIONS[1:])]
    assert getdoc(function).partition("\n")[0].strip() and described(function, "Args") == own
    assert (own != names) == (name in ("convert", "plan"))


def test_every_option_is_documented_where_it_is_defined():
    assert described(quantize8.ConvertOptions, "Attributes") == OPTIONS


def test_functions_are_short_and_take_few_parameters():
    for path in (ROOT / "quantize8").rglob("*.py"):
        options = path.parent.name in ("commands", "cli")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            body = node.body[1:] if ast.get_docstring(node) is not None else node.body
            lines = node.end_lineno - body[0].lineno + 1 if body else 0
            names = [argument.arg for argument in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
            count = len(names) - (names[:1] in (["self"], ["cls"]))
            assert lines <= MOST_LINES, f"{path}: {node.name} has {lines} lines"
            if not (options and node.name in FUNCTIONS):
                assert count <= MOST_PARAMETERS, f"{path}: {node.name} takes {count} parameters"


def test_public_names_stay_functions_when_their_modules_are_imported():
    import quantize8.commands.convert as module

    assert quantize8.convert is module.convert and callable(quantize8.inspect)


def test_every_error_is_public_and_in_the_drawn_tree():
    classes = [name for name, value in vars(errors).items() if isinstance(value, type)]
    assert set(classes) <= set(quantize8.__all__)
    assert all(name in errors.__doc__ for name in classes)


def test_the_kernel_folder_holds_no_python():
    """CuPy imports NVIDIA's namespace package `cuda`, which a package of that name would hide."""
    assert not list(resource_dir("cuda").rglob("*.py"))


def test_every_module_says_what_it_is_and_has_a_test_or_is_used_by_one():
    for path in (ROOT / "quantize8").rglob("*.py"):
        assert ast.get_docstring(ast.parse(path.read_text())), path


def test_constants_of_the_arithmetic_have_one_home():
    for path in (ROOT / "quantize8").rglob("*.py"):
        if path.name == "reference.py":
            continue
        numbers = {node.value for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Constant)}
        assert 127 not in numbers and 65504 not in numbers, path


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True)
    (path,) = folder.glob("*.whl")
    return path


def test_the_wheel_carries_kernels_recipes_text_and_typing(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    for name in ("cuda/README.md", "configs/llm-int8.toml", "texts/sotu-1981.txt", "py.typed", "cli/__init__.py"):
        assert f"quantize8/{name}" in names
    assert not [name for name in names if name.startswith(("tests/", "configs/", "cuda/"))]


@pytest.mark.parametrize(
    ("system", "machine", "tag"),
    [
        ("linux-x86_64", "x86_64", "linux_x86_64"),
        ("win-amd64", "AMD64", "win_amd64"),
        ("macosx-14.0-arm64", "arm64", "macosx_14_0_arm64"),
        ("macosx-10.13-universal2", "arm64", "macosx_11_0_arm64"),
        ("macosx-10.13-universal2", "x86_64", "macosx_10_13_x86_64"),
    ],
)
def test_a_wheel_is_named_after_the_machine_that_its_kernels_are_for(system, machine, tag, monkeypatch):
    build = runpy.run_path(str(ROOT / "cpu" / "build.py"))
    monkeypatch.setattr(sysconfig, "get_platform", lambda: system)
    monkeypatch.setattr(platform, "machine", lambda: machine)
    assert build["_platform_tag"]() == tag


def test_the_wheel_converts_in_an_environment_of_its_own(wheel, tmp_path):
    """Installed away from the checkout, with the dependencies of this environment and nothing else of the project."""
    from helpers.making import llama

    target = tmp_path / "site"
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(target), str(wheel)]
    subprocess.run(command, check=True, capture_output=True)
    source = llama(tmp_path / "source")
    script = (
        f"import sys; sys.path.insert(0, {str(target)!r}); import quantize8; "
        f"assert quantize8.__file__.startswith({str(target)!r}); "
        f"quantize8.convert({str(source)!r}, {str(tmp_path / 'out')!r}, recipe='int8-all')"
    )
    subprocess.run([sys.executable, "-c", script], check=True, cwd=tmp_path)
    assert (tmp_path / "out" / "quantize8.json").is_file()


# What a newcomer must open to follow one tensor. The aim is 20 modules and 100 functions; 279da47 had 32 and 168.
MOST_MODULES, MOST_FUNCTIONS = 20, 150


def test_a_simple_conversion_runs_through_few_modules_and_functions():
    done = subprocess.run(
        [sys.executable, "-m", "tests.helpers.trace"], cwd=ROOT, check=True, capture_output=True, text=True
    )
    modules, functions = map(int, re.findall(r"\d+", done.stdout.splitlines()[-1]))
    assert 10 < modules <= MOST_MODULES and 50 < functions <= MOST_FUNCTIONS, done.stdout
