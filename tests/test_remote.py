"""Streams: an artifact from a remote source equals one from a local copy, nothing is stored, failures are reported."""

import json
import shutil
import sys

import numpy as np
import pytest
import torch
from helpers.adapters import train
from helpers.experts import fused
from helpers.making import llama, mixtral, word_tokenizer

from quantize8 import DependencyError, SourceError, convert
from quantize8.sources import open_checkpoint, ordered, ranges
from quantize8.sources.ordered import OrderedFile, Transfers
from quantize8.sources.ranges import Digest, Interrupted, RemoteFile

TOKEN = "hf_averysecrettoken"


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Many chunks in a tiny file, and no row that begins with one."""
    monkeypatch.setattr(ordered, "CHUNK", 5003)


def same(first, second) -> bool:
    names = sorted(path.relative_to(first) for path in first.rglob("*"))
    return names == sorted(path.relative_to(second) for path in second.rglob("*")) and all(
        (first / name).read_bytes() == (second / name).read_bytes() for name in names if name.name != "quantize8.json"
    )


def tensors(folder) -> dict:
    return json.loads((folder / "quantize8.json").read_text())["tensors"]


@pytest.mark.parametrize("workers", [1, 3])
def test_a_stream_gives_the_bytes_of_a_local_source(workers, hub, tmp_path):
    remote = convert("org/tiny", tmp_path / "remote", stream=True, token=TOKEN, workers=workers)
    convert(str(hub.models["org/tiny"]), tmp_path / "local")
    assert same(tmp_path / "remote", tmp_path / "local") and tensors(remote.out) == tensors(tmp_path / "local")
    assert remote.manifest.source["revision"] == hub.commit("org/tiny")
    assert not list((tmp_path / "cache").rglob("*.safetensors"))
    large = sum(path.stat().st_size for path in hub.models["org/tiny"].glob("model*.safetensors"))
    headers = 2 * 10_000  # read once more, with the chunk that they are in
    assert large < hub.sent < large + headers  # each byte once
    assert all(sent is None for _, path, sent, _ in hub.log if "/cdn/" in path)  # no token to another server
    without = [
        path for _, path, sent, _ in hub.log if path.startswith(("/org", "/api/models")) and sent != f"Bearer {TOKEN}"
    ]
    assert not without


def test_a_stream_of_a_quantized_source(hub, tmp_path):
    convert(str(hub.models["org/tiny"]), tmp_path / "int8", format="compressed-tensors", scheme="w8a16")
    hub.models["org/int8"] = tmp_path / "int8"
    convert("org/int8", tmp_path / "remote", stream=True)
    convert(str(tmp_path / "int8"), tmp_path / "local")
    assert same(tmp_path / "remote", tmp_path / "local")


def test_a_stream_of_experts_whose_order_is_not_the_files(hub, tmp_path):
    hub.models["org/moe"] = mixtral(tmp_path / "moe")
    convert("org/moe", tmp_path / "remote", stream=True, format="bfloat16")
    convert(str(tmp_path / "moe"), tmp_path / "local", format="bfloat16")
    assert same(tmp_path / "remote", tmp_path / "local")


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("model_type", ["gpt_oss", "llama4", "granitemoe"])
def test_a_stream_of_fused_experts(model_type, workers, hub, tmp_path):
    """Gate and up projection are parts of the same rows, which are sent once."""
    hub.models["org/moe"] = fused(tmp_path / "moe", model_type)
    convert("org/moe", tmp_path / "remote", stream=True, format="compressed-tensors", workers=workers)
    sent = hub.sent
    convert(str(tmp_path / "moe"), tmp_path / "local", format="compressed-tensors")
    assert same(tmp_path / "remote", tmp_path / "local")
    assert sent < (tmp_path / "moe" / "model.safetensors").stat().st_size + 2 * 10_000


def test_a_stream_with_a_head_that_is_untied(hub, tmp_path):
    """The embedding is read for the head, too."""
    hub.models["org/tied"] = llama(tmp_path / "tied", tied=True)
    options = {"format": "compressed-tensors", "recipe": "int8-embeddings"}
    convert("org/tied", tmp_path / "remote", stream=True, **options)
    convert(str(tmp_path / "tied"), tmp_path / "local", **options)
    assert same(tmp_path / "remote", tmp_path / "local")


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`")  # which PEFT asks for
def test_a_stream_with_an_adapter(hub, tmp_path):
    base = hub.models["org/tiny"]
    train(base, tmp_path / "lora", target_modules=["q_proj", "down_proj"])
    convert("org/tiny", tmp_path / "remote", stream=True, adapter=str(tmp_path / "lora"))
    convert(str(base), tmp_path / "local", adapter=str(tmp_path / "lora"))
    assert same(tmp_path / "remote", tmp_path / "local")
    convert(str(base), tmp_path / "plain")
    assert not same(tmp_path / "plain", tmp_path / "local")


def test_a_calibrated_stream_reads_the_weights_again(hub, tmp_path):
    word_tokenizer(hub.models["org/tiny"])
    (tmp_path / "text").write_text(" ".join(f"w{i}" for i in range(60)))
    torch.manual_seed(0)
    for source, name in (("org/tiny", "remote"), (str(hub.models["org/tiny"]), "local")):
        convert(source, tmp_path / name, calibrate=tmp_path / "text", stream=True)
    assert same(tmp_path / "remote", tmp_path / "local")


def test_a_cut_connection_is_taken_up_where_it_was(hub, tmp_path):
    hub.cut_after = [3, 0, 2000, 0, 0, 17]
    convert("org/tiny", tmp_path / "out", stream=True)
    convert(str(hub.models["org/tiny"]), tmp_path / "local")
    assert same(tmp_path / "out", tmp_path / "local") and not hub.cut_after
    assert any(asked.startswith("bytes=3-") for asked in hub.ranges())


def test_a_server_that_is_busy_and_an_address_that_expires(hub, tmp_path):
    hub.refuse = [503, 429, 403, 500]  # an address is renewed once, not twice in a row
    convert("org/tiny", tmp_path / "out", stream=True, workers=1)
    assert not hub.refuse and (tmp_path / "out" / "quantize8.json").is_file()


def fails(message, tmp_path, source="org/tiny", **given) -> str:
    with pytest.raises(SourceError, match=message) as caught:
        convert(source, tmp_path / "out", stream=True, token=TOKEN, **given)
    text = str(caught.value)
    assert "\n" not in text and TOKEN not in text and "secret-of-the-address" not in text
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*/config.json"))
    return text


def test_a_connection_that_stays_away(hub, tmp_path):
    hub.cut_after = [0] * 1000
    fails(r"org/tiny: model-0000\d-of-00002.safetensors: cannot be read \(\w+\)", tmp_path)
    assert 1000 - len(hub.cut_after) <= 2 * ranges.TRIES


def test_a_server_that_stalls(hub, tmp_path, monkeypatch):
    checkpoint = open_checkpoint("org/tiny", stream=True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DOWNLOAD_TIMEOUT", 0.05)
    hub.pause = 0.2
    with pytest.raises(SourceError, match=r"cannot be read \(ReadTimeout\)"):
        checkpoint.rows("model.norm.weight", 0, 1)


def test_a_server_without_ranges(hub, tmp_path):
    hub.ignores_range = True
    fails("does not support range requests", tmp_path)


@pytest.mark.parametrize("shards", [1, 2])
def test_content_that_is_not_what_the_hub_lists(shards, hub, tmp_path):
    """The last byte of a weight differs; all headers are right."""
    model = hub.models["org/tiny"] if shards == 2 else llama(tmp_path / "single")
    hub.models["org/tiny"] = model
    name = sorted(path.name for path in model.glob("model*.safetensors"))[-1]
    data = bytearray((model / name).read_bytes())
    data[-1] ^= 1
    hub.replaced[name] = bytes(data)
    fails(f"{name}: its content does not have the sha256 that the hub lists", tmp_path)


def test_a_stream_goes_on_from_the_files_that_were_confirmed(hub, tmp_path):
    """Tensors from a file with wrong content are discarded, even though their bytes are as they were written."""
    names = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    data = bytearray((hub.models["org/tiny"] / names[1]).read_bytes())
    data[-1] ^= 1
    hub.replaced[names[1]] = bytes(data)
    fails(f"{names[1]}: its content does not have the sha256", tmp_path, workers=1)
    hub.replaced.clear()
    before = len(hub.log)
    found = convert("org/tiny", tmp_path / "out", stream=True, token=TOKEN, workers=1)
    in_first = [info for info in found.plan.checkpoint.tensors.values() if info.file == names[0]]
    assert found.resumed == len(in_first)
    convert(str(hub.models["org/tiny"]), tmp_path / "local")
    assert same(tmp_path / "out", tmp_path / "local")
    again = [asked for method, path, _, asked in hub.log[before:] if method == "GET" and names[0] in path and asked]
    length = int.from_bytes((hub.models["org/tiny"] / names[0]).read_bytes()[:8], "little")
    assert again == ["bytes=0-7", f"bytes=8-{length + 7}"]  # its header, to see that it is the same


def test_content_of_another_size(hub, tmp_path):
    name = "model-00002-of-00002.safetensors"
    hub.replaced[name] = (hub.models["org/tiny"] / name).read_bytes() + b"more"
    fails(f"{name}: changed while it was read", tmp_path)
    hub.replaced[name] = b"less"
    fails(f"{name}: changed while it was read", tmp_path)


def test_content_that_changes_on_the_way(hub, tmp_path, monkeypatch):
    name = "model-00001-of-00002.safetensors"
    checkpoint = open_checkpoint("org/tiny", stream=True)
    data = bytearray((hub.models["org/tiny"] / name).read_bytes())
    data[-1] ^= 1
    hub.replaced[name] = bytes(data)
    first = next(iter(checkpoint.tensors.values()))
    with pytest.raises(SourceError, match="another ETag"):
        checkpoint.rows(first.name, 0, first.shape[0])


@pytest.mark.parametrize(
    ("model", "answer", "message"),
    [
        ("org/nothing", None, "no such folder here and no such model on the hub"),
        ("org/gated", (403, "GatedRepo"), "gated; ask for access"),
        ("org/hidden", (401, "RepoNotFound"), "no such model on the hub"),
        ("org/broken", (400, "Oops"), "download failed"),
    ],
)
def test_models_that_cannot_be_had(hub, tmp_path, model, answer, message):
    if answer:
        hub.models[model] = answer
    fails(message, tmp_path, model)


def test_what_cannot_be_streamed(hub, tmp_path):
    hub.models["org/bin"] = tmp_path / "bin"
    hub.models["org/bin"].mkdir()
    (tmp_path / "bin" / "pytorch_model.bin").write_bytes(b"x")
    fails("holds no safetensors, and nothing else is streamed", tmp_path, "org/bin")
    fails("has no revision 'v9'", tmp_path, revision="v9")
    fails("no such folder or file", tmp_path, "./nowhere")
    hub.stop()
    fails("the hub cannot be reached", tmp_path)


def test_a_folder_is_read_as_ever(tmp_path):
    source = llama(tmp_path / "source")
    convert(str(source), tmp_path / "out", stream=True)
    assert (tmp_path / "out" / "quantize8.json").is_file()


def test_an_index_that_names_a_missing_file(hub, tmp_path):
    (hub.models["org/tiny"] / "model-00002-of-00002.safetensors").unlink()
    fails(r"model-00002-of-00002\.safetensors is missing", tmp_path)


@pytest.mark.parametrize(
    "header", [b"", b"\xff" * 8, (2**40).to_bytes(8, "little") + b"{}", bytes(8), b"\x05" + bytes(7)]
)
def test_headers_that_lie(header, hub, tmp_path):
    hub.models["org/tiny"] = llama(tmp_path / "single")
    (tmp_path / "single" / "model.safetensors").write_bytes(header)
    fails("not a whole safetensors file", tmp_path)
    assert hub.sent < 100


def test_a_listing_without_sizes(hub, tmp_path):
    hub.lists_sizes = False
    convert("org/tiny", tmp_path / "out", stream=True)
    assert (tmp_path / "out" / "quantize8.json").is_file()


class Memory(RemoteFile):
    """A file in memory that counts what is fetched, and may fail or change."""

    def __init__(self, data: bytes, digest=None) -> None:
        super().__init__("file", len(data), digest)
        self.data, self.fetched, self.failures = data, [], []

    def _fetch(self, start, stop, data) -> None:
        self.fetched.append((start, stop))
        if self.failures:
            raise self.failures.pop(0)
        data += self.data[start:stop]


def read(file: OrderedFile, start: int, stop: int) -> bytes:
    target = bytearray(stop - start)
    file.read_into(memoryview(target), start)
    return bytes(target)


@pytest.fixture
def transfers():
    transfers = Transfers()
    yield transfers
    transfers.close()


def test_any_order_gives_the_same_bytes_and_digest(transfers):
    import hashlib

    data = np.random.default_rng(0).bytes(123_456)
    sha = hashlib.sha256(data).hexdigest()
    git = hashlib.sha1(b"blob 123456\0" + data).hexdigest()
    random = np.random.default_rng(1)
    for digest in (Digest("sha256", sha), Digest("git-sha1", git), None):
        file = OrderedFile(Memory(data, digest), transfers)
        for _ in range(60):
            start = int(random.integers(len(data)))
            stop = min(len(data), start + int(random.integers(9000)))
            assert read(file, start, stop) == data[start:stop]
        file.confirm()
        file.confirm()
    with pytest.raises(SourceError, match="does not have the sha256"):
        OrderedFile(Memory(data, Digest("sha256", "0" * 64)), transfers).confirm()
    empty = OrderedFile(Memory(b"", Digest("sha256", hashlib.sha256(b"").hexdigest())), transfers)
    empty.confirm()


def test_a_reader_in_order_fetches_each_byte_once_and_holds_few_chunks(transfers):
    memory = Memory(bytes(200_000))
    file = OrderedFile(memory, transfers)
    for start in range(0, 200_000, 700):
        read(file, start, min(start + 700, 200_000))
        assert len(file._window) <= ordered.AHEAD and len(file._kept) <= 2
        read(file, max(0, start - 3000), start)  # what was just passed is still there
    assert sum(stop - start for start, stop in memory.fetched) == 200_000


def test_a_second_reading_that_differs_is_refused(transfers):
    memory = Memory(bytes(100_000))
    file = OrderedFile(memory, transfers)
    read(file, 90_000, 91_000)
    memory.data = bytes([1]) * 100_000
    with pytest.raises(SourceError, match="two reads of the same place differ"):
        for start in range(0, 100_000, 5000):
            read(file, start, start + 5000)
    with pytest.raises(SourceError, match="two reads of the same place differ"):
        read(OrderedFile(memory, transfers, b"a header of its own"), 0, 10)


def test_waiting_grows_to_a_limit_and_follows_the_server(monkeypatch):
    waits = []
    monkeypatch.setattr(ranges.Event, "wait", lambda self, seconds: waits.append(seconds))
    memory = Memory(bytes(10))
    memory.failures = [Interrupted("x") for _ in range(5)]
    assert memory.read(2, 10) == bytes(8)
    assert waits == [ranges.WAIT * 2**i for i in range(5)]
    memory.failures = [Interrupted("busy", 7.0)]
    memory.read(0, 1)
    assert waits[-1] == 7.0
    memory.failures = [Interrupted("x") for _ in range(ranges.TRIES)]
    with pytest.raises(SourceError, match="file: cannot be read"):
        memory.read(0, 1)
    assert waits[-3:] == [ranges.MAX_WAIT] * 3 and sum(waits[7:]) < 90


@pytest.fixture
def store(tmp_path):
    """The same model in fsspec's memory, and in a folder; addresses of both."""
    import fsspec

    source = llama(tmp_path / "source", shards=2)
    system = fsspec.filesystem("memory")
    for path in source.iterdir():
        system.pipe_file(f"/bucket/model/{path.name}", path.read_bytes())
    yield system, source, ["memory://bucket/model", f"file://{source}"]
    system.rm("/bucket", recursive=True)


def test_stores_give_the_bytes_of_a_local_source(store, tmp_path):
    _, source, addresses = store
    convert(str(source), tmp_path / "local")
    for i, address in enumerate(addresses):
        done = convert(address, tmp_path / f"remote{i}")
        assert same(done.out, tmp_path / "local") and done.manifest.source == {"id": address}
    assert open_checkpoint(addresses[0], stream=True).name == "model"


def test_a_driver_that_keeps_listings(store, tmp_path, monkeypatch):
    """Like S3's driver: its entries in a listing differ from those for a single file."""
    system, source, (address, _) = store
    kept, ls, info = {}, type(system).ls, type(system).info

    def keeping(self, path, detail=True, **_):
        entries = [{**entry, "Size": entry["size"]} for entry in ls(self, path, detail=True)]
        kept.update({entry["name"]: entry for entry in entries})
        return entries if detail else [entry["name"] for entry in entries]

    monkeypatch.setattr(type(system), "ls", keeping)
    monkeypatch.setattr(type(system), "info", lambda self, path, **_: kept.get(path) or info(self, path))
    monkeypatch.setattr(type(system), "invalidate_cache", lambda self, path=None: kept.clear())
    convert(str(source), tmp_path / "local")
    assert same(convert(address, tmp_path / "remote").out, tmp_path / "local")


def test_a_store_that_changes(store, tmp_path):
    system, _, (address, _) = store
    checkpoint = open_checkpoint(address, stream=True)
    name = "/bucket/model/model-00001-of-00002.safetensors"
    data = system.cat_file(name)
    checkpoint.confirm()
    system.pipe_file(name, data)
    fresh = open_checkpoint(address, stream=True)
    system.pipe_file(name, data + b"x")
    with pytest.raises(SourceError, match=r"model-00001.*changed while it was read"):
        fresh.confirm()
    system.rm(name)
    with pytest.raises(SourceError, match=r"model-00001.*changed while it was read"):
        fresh.confirm()
    fails("model-00001-of-00002.safetensors is missing", tmp_path, address)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("memory://bucket/nowhere", "no such folder"),
        ("memory://", "holds no safetensors"),
        ("nonsense://bucket/model", "cannot be opened"),
        ("file:///nowhere/at/all", "no such folder"),
    ],
)
def test_addresses_that_lead_nowhere(source, message, tmp_path):
    with pytest.raises(SourceError, match=message) as caught:
        convert(source, tmp_path / "out")
    assert "\n" not in str(caught.value)


def test_a_driver_that_is_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "s3fs", None)
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(DependencyError, match=r"pip install 'quantize8\[remote\]'"):
        convert("s3://bucket/model", tmp_path / "out")
    with pytest.raises(DependencyError, match="pip install gcsfs") as caught:
        convert("gs://user:password@bucket/model?key=secret", tmp_path / "out")
    assert "password" not in str(caught.value) and "secret" not in str(caught.value)


def test_a_hub_address(hub, tmp_path):
    done = convert("hf://org/tiny", tmp_path / "out")
    assert done.manifest.source == {"id": "org/tiny", "revision": hub.commit("org/tiny")}
    fails("has no revision 'v9'", tmp_path / "new", "hf://org/tiny@v9")


def test_only_convert_reads_addresses(store):
    with pytest.raises(SourceError, match="only convert reads addresses"):
        open_checkpoint("memory://bucket/model")


def test_a_stream_leaves_a_cache_that_a_download_completes(hub, tmp_path):
    convert("org/tiny", tmp_path / "out", stream=True)
    assert open_checkpoint("org/tiny").tensors
    shutil.rmtree(tmp_path / "cache")
    convert("org/tiny", tmp_path / "again", stream=True)
    hub.stop()
    with pytest.raises(SourceError, match="not in the cache"):
        open_checkpoint("org/tiny")
