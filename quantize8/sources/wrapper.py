"""The base of checkpoints that read through another one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from quantize8.kernels.reference import Array
from quantize8.sources.base import Checkpoint, TensorInfo


class Wrapper(Checkpoint):
    """A checkpoint that delegates to another one whatever a subclass does not override.

    Only `blocks` is not delegated, so that it reads through the subclass's `rows`.

    Args:
        inner: The checkpoint to delegate to.
        tensors: The tensors of the wrapper by name.
    """

    def __init__(self, inner: Checkpoint, tensors: dict[str, TensorInfo]) -> None:
        facts = inner.files, inner.decoded, inner.is_remote, inner.one_reader_a_file
        super().__init__(inner.folder, inner.name, inner.identity, tensors, *facts)
        self.inner = inner

    @property
    def config(self) -> dict[str, Any]:
        """See `Checkpoint.config`."""
        return self.inner.config

    @property
    def is_encoder(self) -> bool:
        """See `Checkpoint.is_encoder`."""
        return self.inner.is_encoder

    @property
    def origin(self) -> Checkpoint:
        """See `Checkpoint.origin`."""
        return self.inner.origin

    @property
    def stored_bytes(self) -> int:
        """See `Checkpoint.stored_bytes`."""
        return self.inner.stored_bytes

    def fingerprint(self) -> dict[str, list[Any]]:
        """See `Checkpoint.fingerprint`."""
        return self.inner.fingerprint()

    def int8_rows(self, name: str, start: int, stop: int) -> tuple[Array, Array]:
        """See `Checkpoint.int8_rows`."""
        return self.inner.int8_rows(name, start, stop)

    def rows(self, name: str, start: int, stop: int) -> Array:
        """See `Checkpoint.rows`."""
        return self.inner.rows(name, start, stop)

    def confirm(self, file: str | None = None) -> None:
        """See `Checkpoint.confirm`."""
        self.inner.confirm(file)

    def left_behind(self) -> dict[str, str]:
        """See `Checkpoint.left_behind`."""
        return self.inner.left_behind()

    def require_companions(self) -> None:
        """See `Checkpoint.require_companions`."""
        self.inner.require_companions()

    def write_companions(self, folder: Path) -> None:
        """See `Checkpoint.write_companions`."""
        self.inner.write_companions(folder)


class Renamed(Wrapper):
    """A checkpoint with some of its tensors under other names.

    Args:
        inner: The checkpoint.
        names: Other name -> the name in the checkpoint.
    """

    def __init__(self, inner: Checkpoint, names: Mapping[str, str]) -> None:
        new = {stored: name for name, stored in names.items()}
        infos = (replace(info, name=new.get(info.name, info.name)) for info in inner.tensors.values())
        super().__init__(inner, {info.name: info for info in infos})
        self.names = names
        self.decoded = frozenset(new.get(name, name) for name in inner.decoded)

    def rows(self, name: str, start: int, stop: int) -> Array:
        """See `Checkpoint.rows`."""
        return self.inner.rows(self.names.get(name, name), start, stop)

    def int8_rows(self, name: str, start: int, stop: int) -> tuple[Array, Array]:
        """See `Checkpoint.int8_rows`."""
        return self.inner.int8_rows(self.names.get(name, name), start, stop)

    def blocks(self, name: str, block_bytes: int | None = None, multiple: int = 1) -> Iterator[Array]:
        """See `Checkpoint.blocks`."""
        return self.inner.blocks(self.names.get(name, name), block_bytes, multiple)
