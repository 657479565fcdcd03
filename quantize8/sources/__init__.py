"""Reading checkpoints: a hub id, a folder, or one file, in safetensors, torch's .bin, or GGUF; quantized or not."""

from __future__ import annotations

from pathlib import Path

from quantize8.errors import SourceError
from quantize8.files import is_url
from quantize8.formats.gguf.parts import find_gguf, is_gguf
from quantize8.formats.gguf.reader import GgufCheckpoint
from quantize8.sources.address import without_secrets
from quantize8.sources.base import CONFIG_NAME, Checkpoint, TensorInfo, companions, read_config
from quantize8.sources.fetch import download, is_stored
from quantize8.sources.quantized import QuantizedCheckpoint, decode
from quantize8.sources.remote import open_stream
from quantize8.sources.safetensors import SafetensorsCheckpoint, open_safetensors
from quantize8.sources.torch_bin import TorchCheckpoint, open_torch

__all__ = ["Checkpoint", "QuantizedCheckpoint", "TensorInfo", "is_url", "locate", "open_checkpoint"]


def open_checkpoint(
    source: str, *, revision: str | None = None, token: str | None = None, stream: bool | None = False
) -> Checkpoint:
    """Open a model by folder, file or hub id; headers are read and checked, values are not.

    With `stream` the weights of a hub model stay there, and are read by range; so are those at an address such as
    s3://bucket/model, always. What is on this machine is read from there. With None they are if they are not stored
    here, and can be. Raises SourceError, in one line, where the source is missing, incomplete, damaged or unsafe.
    """
    if is_url(source) or not Path(source).expanduser().exists():
        _check_id(source)
        stream = (is_url(source) or not is_stored(source, revision, token)) if stream is None else stream
    else:
        stream = False
    if stream:
        return decode(open_stream(source, revision, token))
    path, identity = locate(source, revision=revision, token=token)
    name = identity["id"].rpartition("/")[2]
    if path.is_file():
        return _open_file(path, identity, name.removesuffix(path.suffix))
    if (gguf := find_gguf(path)) is not None:
        return GgufCheckpoint(gguf, identity, name)
    _refuse_adapter(path)
    read_config(path)
    companions(path)
    checkpoint = open_safetensors(path, identity, name) or open_torch(path, identity, name)
    if checkpoint is None:
        raise SourceError(f"{path}: has a config.json but no weights (*.safetensors or pytorch_model.bin); fetch them")
    return decode(checkpoint)


def locate(source: str, *, revision: str | None = None, token: str | None = None) -> tuple[Path, dict[str, str]]:
    """Where a source lies on this machine, downloaded if need be, and what to call it in the manifest."""
    path = Path(source).expanduser()
    if path.exists():
        return path, {"id": path.resolve().name}
    if is_url(source):
        raise SourceError(f"{without_secrets(source)}: only convert reads addresses; copy the model here first")
    _check_id(source)
    folder, commit = download(source, revision, token)
    return folder, {"id": source, "revision": commit}


def _check_id(source: str) -> None:
    if is_url(source):
        return
    if source.startswith((".", "/", "~")) or source.count("/") > 1 or not source.strip():
        raise SourceError(f"{source}: no such folder or file; name a folder, a file, or a hub id like org/model")


def _refuse_adapter(folder: Path) -> None:
    """Name an adapter as what it is: a folder with its settings and without a model's, or with no other weights."""
    weights = [path.name for path in folder.iterdir() if path.suffix in (".safetensors", ".bin", ".gguf")]
    alone = bool(weights) and all(name.startswith("adapter_model.") for name in weights)
    if (folder / "adapter_config.json").is_file() and (alone or not (folder / CONFIG_NAME).is_file()):
        raise SourceError(
            f"{folder}: holds an adapter, not a model; merge it into its base model (PEFT: merge_and_unload), "
            "save that, and convert it"
        )


def _open_file(path: Path, identity: dict[str, str], name: str) -> Checkpoint:
    if is_gguf(path):
        return GgufCheckpoint(path, identity, name)
    if path.suffix not in (".safetensors", ".bin"):
        raise SourceError(f"{path}: not a checkpoint file; name a .safetensors, .bin or .gguf file, or a folder")
    if not (path.parent / CONFIG_NAME).is_file():
        raise SourceError(f"{path}: has no {CONFIG_NAME} beside it, which says what model it is; put the model's there")
    read_config(path.parent)
    companions(path.parent)
    kind = SafetensorsCheckpoint if path.suffix == ".safetensors" else TorchCheckpoint
    return decode(kind(path.parent, [path.name], identity, name))
