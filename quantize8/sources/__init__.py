"""Open checkpoints: a hub id, a folder or a single file, in safetensors, PyTorch .bin or GGUF, quantized or not."""

from __future__ import annotations

from pathlib import Path

from quantize8.errors import SourceError
from quantize8.files import is_url
from quantize8.sources.base import CONFIG_NAME, Checkpoint, TensorInfo, companions, read_config
from quantize8.sources.safetensors import SafetensorsCheckpoint, open_safetensors

__all__ = ["Checkpoint", "TensorInfo", "locate", "open_checkpoint"]


_ADAPTER = "adapter_config.json"


def open_checkpoint(
    source: str,
    *,
    revision: str | None = None,
    token: str | None = None,
    stream: bool | None = False,
    adapter: str | None = None,
) -> Checkpoint:
    """Open a model. Headers are read and checked, values are not.

    Args:
        source: Folder, file, hub id, or address such as s3://bucket/model.
        revision: Branch, tag or commit of a hub model.
        token: Hub token.
        stream: Read the weights of a hub model by byte range instead of downloading them; None to do so only if they
            are not stored on this machine. Weights at an address are always streamed, those of a folder or file never.
        adapter: The folder of a LoRA adapter to merge into the model as it is read; None for none.

    Raises:
        SourceError: The source or the adapter is missing, incomplete, damaged or unsafe, or they do not fit together.
    """
    base: Checkpoint | None = None
    if is_url(source) or not Path(source).expanduser().exists():
        from quantize8.sources.fetch import is_stored

        _check_id(source)
        if (is_url(source) or not is_stored(source, revision, token)) if stream is None else stream:
            from quantize8.sources.quantized import decode
            from quantize8.sources.remote import open_stream

            base = decode(open_stream(source, revision, token))
    if base is None:
        path, identity = locate(source, revision=revision, token=token)
        name = identity["id"].rpartition("/")[2]
        base = _open_folder(path, identity, name) if path.is_dir() else _open_file(path, identity, name)
    if adapter is None:
        return base
    from quantize8.sources.adapter import merged

    return merged(base, adapter)


def locate(source: str, *, revision: str | None = None, token: str | None = None) -> tuple[Path, dict[str, str]]:
    """Find a source on this machine, downloading it if necessary.

    Args:
        source: Folder, file or hub id.
        revision: Branch, tag or commit of a hub model.
        token: Hub token.

    Returns:
        The path, and what the manifest records about the source: {"id"}, or {"id", "revision"} for a hub model.

    Raises:
        SourceError: There is no such source, or it is an address, which only `convert` reads.
    """
    path = Path(source).expanduser()
    if path.exists():
        return path, {"id": path.resolve().name}
    if is_url(source):
        from quantize8.sources.address import without_secrets

        raise SourceError(f"{without_secrets(source)}: only convert reads addresses; copy the model here first")
    from quantize8.sources.fetch import download

    _check_id(source)
    folder, commit = download(source, revision, token)
    return folder, {"id": source, "revision": commit}


def _open_folder(path: Path, identity: dict[str, str], name: str) -> Checkpoint:
    from quantize8.sources.quantized import decode

    if any(file.suffix.lower() == ".gguf" for file in path.iterdir()):
        from quantize8.formats.gguf.parts import find_gguf
        from quantize8.formats.gguf.reader import GgufCheckpoint

        if (gguf := find_gguf(path)) is not None:
            return GgufCheckpoint(gguf, identity, name)
    if (path / _ADAPTER).is_file():
        _refuse_adapter(path)
    read_config(path)
    companions(path)
    if (stored := open_safetensors(path, identity, name)) is not None:
        return decode(stored)
    from quantize8.sources.torch_bin import open_torch

    if (pickled := open_torch(path, identity, name)) is not None:
        return decode(pickled)
    raise SourceError(f"{path}: has a config.json but no weights (*.safetensors or pytorch_model.bin); download them")


def _check_id(source: str) -> None:
    if is_url(source):
        return
    if source.startswith((".", "/", "~")) or source.count("/") > 1 or not source.strip():
        raise SourceError(f"{source}: no such folder or file; name a folder, a file or a hub id such as org/model")


def _refuse_adapter(folder: Path) -> None:
    """Refuse a folder with adapter settings that has no config.json, or only adapter weights."""
    weights = [path.name for path in folder.iterdir() if path.suffix in (".safetensors", ".bin", ".gguf")]
    alone = bool(weights) and all(name.startswith("adapter_model.") for name in weights)
    if alone or not (folder / CONFIG_NAME).is_file():
        raise SourceError(
            f"{folder}: holds an adapter, not a model; name its base model as the source: "
            f"quantize8 convert BASE --adapter {folder}"
        )


def _open_file(path: Path, identity: dict[str, str], name: str) -> Checkpoint:
    from quantize8.formats.gguf.parts import is_gguf
    from quantize8.sources.quantized import decode

    name = name.removesuffix(path.suffix)
    if is_gguf(path):
        from quantize8.formats.gguf.reader import GgufCheckpoint

        return GgufCheckpoint(path, identity, name)
    if path.suffix not in (".safetensors", ".bin"):
        raise SourceError(f"{path}: not a checkpoint file; name a .safetensors, .bin or .gguf file, or a folder")
    if not (path.parent / CONFIG_NAME).is_file():
        raise SourceError(f"{path}: has no {CONFIG_NAME} beside it, which describes the model; put the model's there")
    read_config(path.parent)
    companions(path.parent)
    if path.suffix == ".safetensors":
        return decode(SafetensorsCheckpoint(path.parent, [path.name], identity, name))
    from quantize8.sources.torch_bin import TorchCheckpoint

    return decode(TorchCheckpoint(path.parent, [path.name], identity, name))
