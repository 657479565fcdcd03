"""Files on systems that lack what Linux has: the same bytes, and locks; importing needs nothing of POSIX."""

import ast
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from helpers.artifacts import digests
from helpers.making import llama, word_tokenizer
from helpers.other_system import FUNCTIONS, MODULES

from quantize8 import files
from quantize8.destinations.journal import Journal, is_locked, read_heading
from quantize8.files import cache_dir

ROOT = Path(__file__).parent.parent
RANDOM = os.urandom(1 << 16)


@pytest.fixture(params=["by position", "by moving"])
def descriptor(request, tmp_path, monkeypatch):
    if request.param == "by moving":
        for name in ("pread", "preadv", "pwrite", "pwritev"):
            monkeypatch.delattr(os, name)
        monkeypatch.setattr(files, "_START_WRITING", None)
    found = files.open_file(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    yield found
    os.close(found)


def test_threads_read_and_write_by_position(descriptor):
    """A position that another thread moved between two calls would mix up the pieces."""
    pieces = [(start, RANDOM[start : start + 257]) for start in range(0, len(RANDOM), 257)]

    def read(piece):
        target = bytearray(len(piece[1]))
        count = files.read_at(descriptor, memoryview(target), piece[0])
        return count == len(target) and target == piece[1]

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda piece: files.write_at(descriptor, piece[1], piece[0]), pieces))
        assert all(pool.map(read, pieces * 4))
    assert files.read_at(descriptor, memoryview(bytearray(9)), len(RANDOM) - 4) == 4
    assert files.read_at(descriptor, memoryview(bytearray(9)), len(RANDOM)) == 0
    files.write_at(descriptor, b"", 0)


@pytest.mark.skipif(sys.platform != "linux", reason="what it imitates is what other systems are")
@pytest.mark.parametrize("system", ["bare", "windows"])
def test_another_system_makes_the_same_bytes(system, tmp_path):
    source = word_tokenizer(llama(tmp_path / "source", shards=2))
    texts = []
    for name in ("posix", system):
        command = [sys.executable, "helpers/other_system.py", name, str(source), str(tmp_path / name / "out")]
        (tmp_path / name).mkdir()
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, cwd=ROOT / "tests", env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        texts.append(done.stdout)
    assert digests(tmp_path / "posix" / "out") == digests(tmp_path / system / "out")
    assert texts[0] == texts[1]
    assert not [path for path in tmp_path.rglob("*") if ".lock" in path.name or ".partial" in path.name]


def test_no_module_needs_what_only_posix_has():
    """Functions are asked for with hasattr, in `files` and around advice to the disk."""
    for path in sorted((ROOT / "quantize8").rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
        names |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        assert not names & MODULES, path
        used = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute) and node.attr in FUNCTIONS}
        asked = {
            node.args[1].value
            for node in ast.walk(tree)
            if isinstance(node, ast.Call)
            and isinstance(node.func, ast.Name)
            and node.func.id == "hasattr"
            and isinstance(node.args[1], ast.Constant)
        }
        assert used <= asked, path


def test_where_locked_bytes_cannot_be_read_another_file_is_locked(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "WINDOWS", True)
    path = tmp_path / "a.journal"
    journal = Journal(path)
    journal.begin({"decisions": 1}, {})
    assert is_locked(path) and read_heading(path) == {"decisions": 1}
    with pytest.raises(BlockingIOError):
        Journal(path)
    journal.close()
    assert not is_locked(path)
    journal = Journal(path)
    journal.remove()
    assert not [*tmp_path.iterdir()] and not is_locked(path)


def test_the_cache_is_where_linux_has_it(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_dir("kernels") == tmp_path / "quantize8" / "kernels"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_dir("out") == tmp_path / ".cache" / "quantize8" / "out"


def test_what_the_system_does_not_tell(tmp_path, monkeypatch):
    (tmp_path / "file").write_bytes(bytes(10_000))
    assert files.stored_bytes(tmp_path / "file") >= 10_000
    monkeypatch.setattr(Path, "stat", lambda _: os.stat_result(range(10)))
    assert files.stored_bytes(tmp_path / "file") == 6
