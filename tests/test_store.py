"""Conversions to a store: the bytes of a local artifact, however they are stopped, with local room for one file."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import fsspec
import pytest
from helpers.gguf_files import assemble, config_of, folder_of
from helpers.making import llama, word_tokenizer

from benchmarks.checkpoints import make_llama
from benchmarks.faults import SHARD_SIZE, kill_and_resume_to_a_store
from quantize8 import ArtifactError, DependencyError, OutputError, SourceError, cli, convert, verify
from quantize8.artifact.manifest import MANIFEST_NAME
from quantize8.commands.finalize import finalize
from quantize8.conversion.driver import Writer
from quantize8.destinations.base import destination_of
from quantize8.destinations.journal import SUFFIX, _line
from quantize8.destinations.local import LocalFolder, WeightFile
from quantize8.destinations.store import PARTIAL
from quantize8.destinations.store import ObjectStore as Store
from quantize8.sources.address import reason, without_secrets

SIZE = {"max_shard_size": "6KB"}  # several files of the tiny Llama
TEXT = "w1 w2 w3 w4 w5 w6 w7 w8 w9 w10 " * 8
ENDING = f"{PARTIAL}/{MANIFEST_NAME}"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """Where weight files are written locally; must be empty after each test, except those about leftovers."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "quantize8" / "out"


@pytest.fixture(params=["memory", "local"])
def address(request, tmp_path):
    """An address in fsspec's memory, and one in a folder, which is a store like any other."""
    if request.param == "local":
        yield f"local://{tmp_path}/store/model"
        return
    yield "memory://bucket/model"
    system = fsspec.filesystem("memory")
    if system.exists("/bucket"):
        system.rm("/bucket", recursive=True)


@pytest.fixture
def source(tmp_path):
    return str(word_tokenizer(llama(tmp_path / "source", shards=2)))


@pytest.fixture
def calls(monkeypatch):
    """What is uploaded and removed, in order; `fail` is called before each."""
    found, put, write, remove = [], Store.put, Store.write, Store.remove

    class Calls(list):
        fail = staticmethod(lambda _kind, _name: None)

    found = Calls()

    def heard(kind, name):
        found.fail(kind, name)
        found.append((kind, name))

    monkeypatch.setattr(Store, "put", lambda self, path, name: (heard("put", name), put(self, path, name))[1])
    monkeypatch.setattr(Store, "write", lambda self, name, data: (heard("write", name), write(self, name, data))[1])
    monkeypatch.setattr(Store, "remove", lambda self, names: [heard("remove", n) or remove(self, [n]) for n in names])
    return found


def content(address: str) -> dict[str, bytes]:
    system, root = fsspec.core.url_to_fs(address)
    return {path[len(root) :].strip("/"): system.cat_file(path) for path in system.find(root)}


def local(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def copy(address: str, folder: Path) -> Path:
    for name, data in content(address).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


OPTIONS = [
    {},
    SIZE,
    {"format": "compressed-tensors", "max_shard_size": "20KB"},
    {"format": "bfloat16", "max_shard_size": "20KB"},
    {"calibrate": "text", "outlier_columns": 3, "max_shard_size": "10KB"},
    {"calibrate": "text", "smooth": 0.5, "scale": "mse"},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_artifact_is_the_local_one(options, address, source, tmp_path, cache, calls):
    (tmp_path / "text").write_text(TEXT)
    options = options | ({"calibrate": tmp_path / "text"} if "calibrate" in options else {})
    whole, heard = convert(source, tmp_path / "whole", **options), []
    done = convert(source, address, progress=lambda done, total: heard.append((done, total)), **options)
    assert content(address) == local(tmp_path / "whole") and verify(copy(address, tmp_path / "copy"))
    assert done.manifest == whole.manifest and done.errors == whole.errors and not done.resumed
    assert str(done.out) == address and done.as_json()["out"] == address
    assert max(heard) == (whole.plan.source_bytes, whole.plan.source_bytes)  # threads may tell in another order
    assert {total for _, total in heard} == {whole.plan.source_bytes}
    assert not any(cache.iterdir())
    puts = [name for kind, name in calls if kind == "put"]
    weights = [shard.file for shard in whole.plan.shards]
    assert [name for name in puts if name in weights] == weights
    assert puts.index("config.json") == len(puts) - 2 and puts[-1] == MANIFEST_NAME
    assert "config.json" not in [name for _, name in calls[: calls.index(("put", weights[-1]))]]


def test_gguf(address, tmp_path):
    assemble(folder_of(tmp_path / "folder", config_of("qwen3")), tmp_path / "model.gguf")
    convert(str(tmp_path / "model.gguf"), tmp_path / "whole", format="gguf")
    convert(str(tmp_path / "model.gguf"), address, format="gguf")
    assert content(address) == local(tmp_path / "whole")


def test_a_stream_to_a_store(hub, tmp_path, cache):
    convert("org/tiny", f"local://{tmp_path}/out", stream=True, **SIZE)
    convert("org/tiny", tmp_path / "whole", stream=True, **SIZE)
    assert local(tmp_path / "out") == local(tmp_path / "whole")
    assert not list((tmp_path / "cache").rglob("*.safetensors"))


@pytest.mark.parametrize("stop", [*range(0, 24, 3), *range(23, 28)])
def test_whatever_is_stopped_goes_on(stop, address, source, tmp_path, calls):
    """An error at each upload or removal: no file is uploaded twice, and nothing looks like a model before the end."""
    whole = convert(source, tmp_path / "whole", **SIZE)
    weights = [shard.file for shard in whole.plan.shards]

    def fail(_kind, _name):
        if len(calls) == stop:
            raise KeyboardInterrupt

    calls.fail = fail
    try:
        convert(source, address, **SIZE)
    except KeyboardInterrupt:
        pass
    else:
        pytest.fail(f"there are {len(calls)} calls")
    calls.fail = lambda _kind, _name: None
    there = content(address)
    if "config.json" in there:
        expected = local(tmp_path / "whole")
        assert {name: there.get(name) for name in expected if name != MANIFEST_NAME} == {
            name: data for name, data in expected.items() if name != MANIFEST_NAME
        }
    journals = {name for kind, name in calls if kind == "put" and name.endswith(SUFFIX)}
    finished, before = [name for name in weights if f"{PARTIAL}/{name}{SUFFIX}" in journals], len(calls)
    if MANIFEST_NAME in there:
        with pytest.raises(OutputError, match="exists, and a store cannot replace an artifact"):
            convert(source, address, **SIZE)
    else:
        kept = convert(source, address, **SIZE).resumed
        again = [name for kind, name in calls[before:] if kind == "put" and name in weights]
        assert again == [name for name in weights if name not in finished]
        assert kept >= len(finished)
    assert content(address) == local(tmp_path / "whole")


def test_inside_a_weight_file_it_goes_on_on_the_same_machine(address, source, tmp_path, monkeypatch, cache):
    convert(source, tmp_path / "whole")
    write, done = Writer.write, iter(range(7))

    def dies(self, info, quantizer):
        if next(done, None) is None:
            raise KeyboardInterrupt
        return write(self, info, quantizer)

    with monkeypatch.context() as patch:
        patch.setattr(Writer, "write", dies)
        with pytest.raises(KeyboardInterrupt):
            convert(source, address, workers=1)
    assert not content(address) and any(cache.iterdir())  # the claim is taken back, what is finished is here
    with pytest.raises(OutputError, match=r"unfinished conversion with another recipe.*--overwrite"):
        convert(source, address, threshold=5.0)
    assert convert(source, address).resumed == 7
    assert content(address) == local(tmp_path / "whole") and not any(cache.iterdir())


def test_what_fails_before_a_tensor_is_finished_leaves_nothing(address, source, cache, monkeypatch):
    def dies(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(Writer, "write", dies)
    with pytest.raises(KeyboardInterrupt):
        convert(source, address)
    assert not content(address) and not [path for path in cache.rglob("*") if path.is_file()]


def test_kill_at_any_moment(tmp_path):
    """Three moments here; benchmarks/faults.py tries as many as requested."""
    make_llama(tmp_path / "source", hidden=512, inner=1408, layers=8, vocabulary=512, shards=2)
    convert(str(tmp_path / "source"), tmp_path / "whole", max_shard_size=SHARD_SIZE)
    found = kill_and_resume_to_a_store(tmp_path / "source", tmp_path / "whole", tmp_path / "out", [0.04, 0.1, 0.2])
    assert found["unfinished"] + found["complete"]


def test_a_manifest_that_was_put_in_part(source, tmp_path, calls):
    """By a driver whose uploads are not atomic."""
    calls.fail = lambda kind, name: Path("/nowhere").stat() if (kind, name) == ("put", MANIFEST_NAME) else None
    with pytest.raises(OutputError):
        convert(source, f"local://{tmp_path}/out")
    manifest = (tmp_path / "out" / ENDING).read_bytes()
    (tmp_path / "out" / MANIFEST_NAME).write_bytes(manifest[:-100])
    calls.fail = lambda _kind, _name: None
    with pytest.raises(OutputError, match="holds an unfinished conversion with"):
        convert(source, f"local://{tmp_path}/out", threshold=5.0)
    shutil.copytree(tmp_path / "out", tmp_path / "other")
    assert convert(source, f"local://{tmp_path}/out").resumed
    convert(source, f"local://{tmp_path}/other", threshold=5.0, overwrite=True)
    for options in ({}, {"threshold": 5.0}):
        convert(source, tmp_path / "whole", overwrite=True, **options)
        assert local(tmp_path / ("other" if options else "out")) == local(tmp_path / "whole")


def stopped_at_end(source: str, address: str, calls, **options) -> None:
    """All weight files are there, the artifact is not."""

    def fail(kind, name):
        if name == ENDING:
            raise KeyboardInterrupt

    calls.fail = fail
    with pytest.raises(KeyboardInterrupt):
        convert(source, address, **options)
    calls.fail = lambda _kind, _name: None


@pytest.mark.parametrize("damage", ["gone", "short", "journal gone", "journal torn", "heading alone", "outliers gone"])
def test_a_weight_file_that_is_not_as_its_journal_says_is_written_again(damage, address, source, tmp_path, calls):
    (tmp_path / "text").write_text(TEXT)
    options = {**SIZE, "calibrate": tmp_path / "text", "outlier_columns": 3}
    convert(source, tmp_path / "whole", **options)
    stopped_at_end(source, address, calls, **options)
    system, root = fsspec.core.url_to_fs(address)
    name = sorted(name for name in content(address) if name.endswith(".outliers"))[1]
    name = name.removeprefix(f"{PARTIAL}/").removesuffix(".outliers")
    path, journal = f"{root}/{name}", f"{root}/{PARTIAL}/{name}{SUFFIX}"
    if damage == "gone":
        system.rm_file(path)
    elif damage == "short":
        system.pipe_file(path, system.cat_file(path)[:-1])
    elif damage == "journal gone":
        system.rm_file(journal)
    elif damage == "outliers gone":
        system.rm_file(f"{root}/{PARTIAL}/{name}.outliers")
    else:
        data = system.cat_file(journal)
        system.pipe_file(journal, data[: data.index(b"\n") + 1] if damage == "heading alone" else data[:-1])
    if damage == "journal gone":
        with pytest.raises(OutputError, match=f"holds {name}, which is not part of a conversion"):
            convert(source, address, **options)
        system.rm_file(path)
    with pytest.raises(OutputError, match=f"not finished: {name}; run quantize8 convert .* --part 2/"):
        finalize(address)
    before = len(calls)
    convert(source, address, **options)
    weights = [each for kind, each in calls[before:] if kind == "put" and each.startswith("model-")]
    assert weights == [name] and content(address) == local(tmp_path / "whole")


def test_other_decisions_are_refused_and_overwrite_starts_over(address, source, tmp_path, calls):
    stopped_at_end(source, address, calls, **SIZE)
    before = content(address)
    for options, message in [({"threshold": 5.0, **SIZE}, "another recipe"), ({}, "another layout of files")]:
        with pytest.raises(OutputError, match=rf"model: \.partial holds an unfinished .* with {message}; .*--overw"):
            convert(source, address, **options)
        with pytest.raises(OutputError, match=f"unfinished conversion with {message}"):
            convert(source, address, part="1/2", **options)
    assert content(address) == before
    assert convert(source, address, overwrite=True).resumed == 0
    convert(source, tmp_path / "whole")
    assert content(address) == local(tmp_path / "whole")  # no index of the first is left


def test_overwrite_removes_the_small_files_of_an_end_that_was_stopped(address, source, tmp_path, calls):
    def fail(kind, name):
        if (kind, name) == ("put", MANIFEST_NAME):
            raise KeyboardInterrupt

    calls.fail = fail
    with pytest.raises(KeyboardInterrupt):
        convert(source, address, **SIZE)
    calls.fail = lambda _kind, _name: None
    assert {"config.json", "model.safetensors.index.json"} <= content(address).keys()
    before = len(calls)
    convert(source, address, overwrite=True, format="compressed-tensors")
    removed = [name for kind, name in calls[before:] if kind == "remove"]
    assert removed[0] == "config.json"  # no loader opens it from then on
    convert(source, tmp_path / "whole", format="compressed-tensors")
    assert content(address) == local(tmp_path / "whole")


def test_small_files_that_the_source_has_no_more(address, source, tmp_path, calls):
    (Path(source) / "vocab.txt").write_text("x")
    calls.fail = lambda kind, name: shutil.rmtree("/nowhere") if (kind, name) == ("put", MANIFEST_NAME) else None
    with pytest.raises(OutputError):
        convert(source, address)
    assert "vocab.txt" in content(address)
    calls.fail = lambda _kind, _name: None
    (Path(source) / "vocab.txt").unlink()
    convert(source, address)
    convert(source, tmp_path / "whole")
    assert content(address) == local(tmp_path / "whole")


def test_another_calibration(address, source, tmp_path, calls, monkeypatch):
    (tmp_path / "text").write_text(TEXT)
    options = {"calibrate": tmp_path / "text", "outlier_columns": 3}
    calls.fail = lambda kind, name: Path("/nowhere").stat() if kind == "write" else None
    with pytest.raises(OutputError):
        convert(source, address, **options)
    calls.fail = lambda _kind, _name: None
    assert content(address).keys() == {f"{PARTIAL}/calibration.safetensors"}
    with pytest.raises(OutputError, match=f"^{address}/{PARTIAL}/calibration.safetensors: is of other options"):
        convert(source, address, **options | {"outlier_columns": 4})
    convert(source, tmp_path / "whole", **options | {"outlier_columns": 4})
    convert(source, address, overwrite=True, **options | {"outlier_columns": 4})
    assert content(address) == local(tmp_path / "whole")
    with pytest.raises(OutputError, match="exists"):
        convert(source, address, overwrite=True, **options)


@pytest.mark.parametrize("options", [{}, {"calibrate": "text", "outlier_columns": 3}], ids=str)
def test_parts(options, address, source, tmp_path, monkeypatch):
    (tmp_path / "text").write_text(TEXT)
    options = {**SIZE, **options, **({"calibrate": tmp_path / "text"} if options else {})}
    whole = convert(source, tmp_path / "whole", **options)
    with pytest.raises(OutputError, match=r"no part of it is here \(in .partial\)"):
        finalize(address)
    first = convert(source, address, part="3/3", **options)
    monkeypatch.setattr("quantize8.calibration.calibrate.calibrate", lambda *_, **__: pytest.fail("measured twice"))
    assert first.manifest is None and "config.json" not in content(address)
    convert(source, address, part="1/3", **options)
    with pytest.raises(OutputError, match="not finished: model-0000") as caught:
        finalize(address)
    assert "\n" not in str(caught.value) and f"--out {address}" in str(caught.value)
    convert(source, address, part="2/3", **options)
    assert convert(source, address, part="2/3", **options).resumed > 0
    (tmp_path / "text").unlink()
    done = finalize(address)
    assert done.manifest == whole.manifest and done.errors == whole.errors
    assert content(address) == local(tmp_path / "whole")


def test_the_disk_holds_one_weight_file(address, source, tmp_path, cache, monkeypatch):
    largest, finish = [], WeightFile.finish

    def measured(self):
        finish(self)
        largest.append(sum(path.stat().st_size for path in cache.rglob("*") if path.is_file()))

    monkeypatch.setattr(WeightFile, "finish", measured)
    done = convert(source, address, **SIZE)
    sizes = [shard.nbytes for shard in done.plan.shards]
    assert len(largest) == len(sizes) > 3 and max(largest) < 2 * max(sizes) < sum(sizes)


def test_a_disk_without_room_for_a_weight_file(source, address, tmp_path, monkeypatch):
    files = [shard.nbytes for shard in convert(source, address, dry_run=True, **SIZE).plan.shards]
    free = [16 * 2**20 + max(files) + 8192]
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=free[0]))
    convert(source, address, **SIZE)  # though it has no room for all of them
    free[0] = 16 * 2**20
    with pytest.raises(OutputError, match=r"the disk has .* free some space, or set XDG_CACHE_HOME"):
        convert(source, f"{address}-2", **SIZE)
    assert not content(f"{address}-2")


@pytest.mark.parametrize("name", ["README.md", "folder/file", ".partial/of/others"])
def test_what_is_not_ours_is_not_written_to(name, address, source):
    system, root = fsspec.core.url_to_fs(address)
    system.makedirs(f"{root}/{name}".rpartition("/")[0], exist_ok=True)
    system.pipe_file(f"{root}/{name}", b"mine")
    before = content(address)
    for overwrite in (False, True):
        with pytest.raises(
            OutputError, match=f"holds {name.rpartition('/')[0] or name}, which is not part of a conversion"
        ):
            convert(source, address, overwrite=overwrite)
    with pytest.raises(OutputError, match="is a file; choose another address"):
        convert(source, f"{address}/{name}")
    assert content(address) == before


def test_an_artifact_is_not_replaced(address, source, cache):
    convert(source, address)
    before = content(address)
    for options in ({}, {"overwrite": True}, {"part": "1/2"}, {"dry_run": True}, {"threshold": 5.0}):
        with pytest.raises(OutputError, match="exists, and a store cannot replace an artifact in one step") as caught:
            convert(source, address, **options)
        assert "\n" not in str(caught.value)
    with pytest.raises(OutputError, match="exists"):
        finalize(address, overwrite=True)
    assert content(address) == before


def test_credentials_that_remove_nothing(address, source, tmp_path, calls):
    def fail(kind, _name):
        if kind == "remove":
            raise OutputError("not allowed")

    calls.fail = fail
    convert(source, address, **SIZE)
    convert(source, tmp_path / "whole", **SIZE)
    there = content(address)
    assert there.items() >= local(tmp_path / "whole").items() and verify(copy(address, tmp_path / "copy"))
    assert all(name.startswith(PARTIAL) for name in there.keys() - local(tmp_path / "whole").keys())
    with pytest.raises(OutputError, match="exists"):
        convert(source, address, **SIZE)
    calls.fail = lambda _kind, _name: None
    with pytest.raises(OutputError, match="exists"):
        convert(source, address, **SIZE)
    assert content(address) == local(tmp_path / "whole")


def test_a_source_file_with_another_time_is_converted_again(address, source, tmp_path, calls):
    stopped_at_end(source, address, calls, **SIZE)
    os.utime(sorted(Path(source).glob("*.safetensors"))[0], ns=(1, 1))
    assert convert(source, address, **SIZE).resumed == 0
    convert(source, tmp_path / "whole", **SIZE)
    assert content(address) == local(tmp_path / "whole")


def test_a_path_with_a_scheme_is_a_path(source, tmp_path, cache):
    done = convert(source, f"file://{tmp_path}/out")
    assert done.out == tmp_path / "out" and verify(f"file://{tmp_path}/out") and not cache.exists()
    convert(source, f"file://{tmp_path}/parts", part="1/1")
    assert finalize(f"file://{tmp_path}/parts").out == tmp_path / "parts"
    assert destination_of("out") == LocalFolder(Path("out"))
    assert destination_of(Path("s3://bucket")) == LocalFolder(Path("s3:/bucket"))


SECRETS = "memory://someone:pass%21word@bucket/model?key=secret"


def test_no_secret_is_stored_or_shown(source, tmp_path):
    """Neither of the output's address nor of the source's, which journals record for finishing the conversion."""
    system = fsspec.filesystem("memory")
    for path in Path(source).iterdir():
        system.pipe_file(f"/someone:pass%21word@bucket/source/{path.name}", path.read_bytes())
    try:
        convert(SECRETS.partition("/model")[0] + "/source", tmp_path / "out", part="1/2", **SIZE)
        written = local(tmp_path)
        done = convert(SECRETS.partition("/model")[0] + "/source", SECRETS, part="1/2", **SIZE)
        written |= {name: data for name, data in content("memory://").items() if "/source/" not in name}
        for name, data in written.items():
            assert b"pass" not in data and b"secret" not in data, name
        shown = [str(done.out), json.dumps(done.as_json())]
        for options in ({**SIZE, "threshold": 5.0}, {**SIZE}):
            with pytest.raises((OutputError, SourceError)) as caught:
                (convert(source, SECRETS, **options) if "threshold" in options else finalize(SECRETS))
            shown.append(str(caught.value))
        assert not [text for text in shown if "pass" in text or "secret" in text], shown
    finally:
        for folder in system.ls("/", detail=False):
            system.rm(folder, recursive=True)


class Refusing(fsspec.get_filesystem_class("memory")):
    """A driver whose errors quote the address, over several lines."""

    protocol = "refusing"
    store, pseudo_dirs = {}, [""]  # its base has them
    error: type[Exception] = PermissionError
    after = 0

    def _say(self):
        if Refusing.after <= 0:
            raise self.error("no access for refusing://me:pass@host/model\nask me:pass")
        Refusing.after -= 1

    def ls(self, path, detail=True, **kwargs):
        self._say()
        return super().ls(path, detail, **kwargs)

    def pipe_file(self, path, value, **kwargs):
        self._say()
        super().pipe_file(path, value, **kwargs)

    def put_file(self, lpath, rpath, **kwargs):
        self._say()
        super().put_file(lpath, rpath, **kwargs)


@pytest.mark.parametrize("error", [PermissionError, OSError, ConnectionError, RuntimeError, FileNotFoundError])
@pytest.mark.parametrize("after", [0, 2, 3, 4])
def test_what_a_driver_refuses_is_one_line(error, after, source, tmp_path, monkeypatch, capsys):
    fsspec.register_implementation("refusing", Refusing, clobber=True)
    Refusing.error, Refusing.after, Refusing.store = error, after, {}
    if error is FileNotFoundError and after in (0, 1):
        Refusing.after = 2  # of `ls` that says that there is nothing
    command = ["quantize8", "convert", source, "--out", "refusing://me:pass@host/model", "--max-shard-size", "6KB"]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as stop:
        cli.main()
    text = capsys.readouterr().err
    assert stop.value.code == 1 and text.startswith("error: refusing://host/model: cannot be ") and "pass" not in text
    assert text.count("\n") == 1 and "no access for" in text
    Refusing.after = 10**9
    convert(source, "refusing://me:pass@host/model", **SIZE)
    convert(source, tmp_path / "whole", **SIZE)
    names = {path.rpartition("/")[2]: entry.getvalue() for path, entry in Refusing.store.items()}
    assert names == local(tmp_path / "whole")


def test_drivers_that_are_not_there(source, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(DependencyError, match=r"pip install 'quantize8\[remote\]'"):
        convert(source, "s3://bucket/model")
    with pytest.raises(OutputError, match="nonsense://bucket/model: cannot be opened"):
        convert(source, "nonsense://bucket/model")


def test_a_folder_here_that_cannot_be_made(source, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    (tmp_path / "text").write_text(TEXT)
    for options in ({}, {"calibrate": tmp_path / "text"}):
        with pytest.raises(OutputError) as caught:
            convert(source, f"local://{tmp_path}/out", **options)
        assert "\n" not in str(caught.value) and str(tmp_path / "file") in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.filterwarnings("ignore:Use 'content=<...>':DeprecationWarning")  # huggingface_hub's way to send a body
def test_a_model_on_the_hub(hub, source, tmp_path, calls):
    """On the hub of the tests; each file is a commit."""
    from huggingface_hub import HfFileSystem

    HfFileSystem.clear_instance_cache()
    token = "hf_averysecrettoken"
    with pytest.raises(OutputError, match="hf://me/model: cannot be written") as caught:
        convert(source, "hf://me/model", token=token, **SIZE)
    assert "\n" not in str(caught.value) and token not in str(caught.value)
    hub.models["me/model"] = tmp_path / "me"
    (tmp_path / "me").mkdir()
    (tmp_path / "me" / ".gitattributes").write_text("*.safetensors filter=lfs")
    HfFileSystem.clear_instance_cache()
    stopped_at_end(source, "hf://me/model", calls, **SIZE)
    done = convert(source, "hf://me/model", token=token, **SIZE)
    convert(source, tmp_path / "whole", **SIZE)
    written = local(tmp_path / "me")
    assert written.pop(".gitattributes") and written == local(tmp_path / "whole")
    assert done.resumed == len(done.plan.checkpoint.tensors)
    with pytest.raises(OutputError, match="exists"):
        convert(source, "hf://me/model@main", token=token)


def test_push_takes_files_that_are_here(source, address):
    with pytest.raises(OutputError, match="push-to-hub me/model: needs files on this machine, not at"):
        convert(source, address, push_to_hub="me/model")


def test_only_convert_and_finalize_take_addresses(address, monkeypatch, capsys):
    with pytest.raises(ArtifactError, match="only convert and finalize take addresses"):
        verify("s3://someone:pass@bucket/model")
    for command in (["inspect", address], ["run", address], ["evaluate", address], ["push", address, "me/model"]):
        monkeypatch.setattr(sys, "argv", ["quantize8", *command])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        text = capsys.readouterr().err
        assert stop.value.code == 1 and text.count("\n") == 1 and "here first" in text, text


def test_the_command_line(source, tmp_path):
    """In a separate process; with an HTML page, and as JSON."""
    out = f"local://{tmp_path}/out"
    command = [sys.executable, "-m", "quantize8", "convert", source, "--out", out, "--max-shard-size", "6KB"]
    planned = subprocess.run([*command, "--dry-run"], capture_output=True, text=True, check=True)
    assert "would write" in planned.stdout and not (tmp_path / "out").exists()
    part = subprocess.run([*command, "--part", "1/2"], capture_output=True, text=True, check=True)
    assert f"quantize8 finalize {out}" in part.stdout
    done = subprocess.run([*command, "--json", "--report", str(tmp_path / "page.html")], capture_output=True, text=True)
    assert done.returncode == 0 and json.loads(done.stdout)["out"] == out and not done.stderr
    page = (tmp_path / "page.html").read_text()
    assert out in page and "quantize8 verify COPY" in page
    assert verify(tmp_path / "out")


@pytest.mark.parametrize(
    ("address", "shown"),
    [
        ("s3://bucket/model/", "s3://bucket/model"),
        ("ftp://me:pa@ss@host:21/a@b/c?key=1#x", "ftp://host:21/a@b/c"),
        ("hf://me/model@branch", "hf://me/model@branch"),
        ("memory://", "memory:"),
        ("s3://[bucket/model", "s3://[bucket/model"),
    ],
)
def test_addresses_as_they_are_shown(address, shown):
    assert without_secrets(address) == shown


def test_what_drivers_say_is_shown_without_secrets():
    address = "ftp://me:p%40ss@host/model?key=hidden"
    error = PermissionError(f"{address}: no p%40ss, p@ss, me:p%40ss or key=hidden\nsecond line")
    assert reason(error, address) == "ftp://host/model: no ***, ***, *** or ***"


@pytest.mark.parametrize(
    "heading",
    [
        [],
        {},
        {"request": 5},
        {"request": {"source": "x", "of another version": 1}},
        {"decisions": {"source": {"files": 7}}},
    ],
    ids=str,
)
def test_a_journal_of_anybody_is_told_of_in_one_line(heading, source, address):
    convert(source, address, part="1/2", **SIZE)
    store = Store(address)
    names = [name for name in store.files() if name.endswith(SUFFIX)]
    for name in names:
        store.write(name, _line(heading))
    with pytest.raises(OutputError) as caught:
        finalize(address)
    assert "\n" not in str(caught.value) and str(caught.value).startswith(address)
    if heading:
        with pytest.raises(OutputError, match=r"holds an unfinished conversion with (other options|another version)"):
            convert(source, address, **SIZE)
    convert(source, address, overwrite=bool(heading), **SIZE)
