"""What a store holds of a conversion that is not finished, whose it is, and what may be gone on from.

The weight files are at their places. Beside them, in `.partial`, lies a journal of each that was begun: its heading
alone before the file is put, all of it afterwards. So the journals tell whose the files are, and what is finished: a
file of the right size whose journal has all tensors.
"""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from quantize8.artifact.journal import SUFFIX, Records, parse, records_of
from quantize8.artifact.manifest import MANIFEST_NAME, is_inside
from quantize8.artifact.store import PARTIAL, Store
from quantize8.artifact.units import Unit, beside
from quantize8.checkpoint.base import CONFIG_NAME
from quantize8.conversion.staging import unlike
from quantize8.conversion.write import agrees
from quantize8.errors import OutputError

CALIBRATION = f"{PARTIAL}/calibration.safetensors"
ENDING = f"{PARTIAL}/{MANIFEST_NAME}"  # the manifest before its time: whose the small files are, where the end stopped


@dataclass
class Found:
    """What a store holds of a conversion that has no manifest yet."""

    files: dict[str, int | None]  # bytes by name
    journals: dict[str, tuple[dict[str, Any], dict[str, Records]]]  # weight file -> heading, entries
    small: list[str]  # files of an end that was begun
    kept: list[str]  # all that goes when the conversion ends

    def has(self, unit: Unit, heading: dict[str, Any]) -> bool:
        """Whether a weight file is finished, with what is written together with it."""
        stated, entries = self.journals.get(unit.shard.file, ({}, {}))
        expected = {unit.shard.file: unit.shard.nbytes}
        if unit.outliers is not None:
            expected[f"{PARTIAL}/{unit.outliers.file}"] = unit.outliers.nbytes
        whole = all(self.files.get(name) == nbytes for name, nbytes in expected.items())
        return whole and agrees(stated, heading) and entries.keys() >= set(unit.sources)

    def records(self, unit: Unit) -> Records:
        """Of the tensors of a weight file."""
        return records_of(self.journals[unit.shard.file][1])


def look(store: Store) -> Found:
    """What is there already. Raises OutputError for an artifact, and for anything that no conversion has begun."""
    files = store.files()
    kept = [name for name, nbytes in files.items() if nbytes is not None and _is_kept(name)]
    if MANIFEST_NAME in files and files.get(ENDING, files[MANIFEST_NAME]) == files[MANIFEST_NAME]:  # and is whole
        with suppress(OutputError):
            store.remove(kept)  # of the conversion that made it, which was stopped at its very end
        raise OutputError(
            f"{store}: exists, and a store replaces no artifact in one step; remove it, or name another --out"
        )
    names = [name for name in kept if name.endswith(SUFFIX)]
    weights = [name.removeprefix(f"{PARTIAL}/").removesuffix(SUFFIX) for name in names]
    journals = dict(zip(weights, map(parse, store.read(names)), strict=True))
    (ending,) = store.read([ENDING]) if ENDING in files else (b"",)
    found = Found(files, journals, _files_of(ending), kept)
    known = {MANIFEST_NAME, *kept, *weights, *(name.partition("/")[0] for name in found.small)}
    foreign = sorted(files.keys() - known)
    if foreign:
        raise OutputError(f"{store}: holds {foreign[0]}, which is of no unfinished conversion; name an empty --out")
    return found


def accept(store: Store, found: Found, decisions: dict[str, Any], start_over: bool) -> None:
    """Refuse to go on from other decisions; with `start_over` remove what came of them, the journals last."""
    others = {name: other for name, (stated, _) in found.journals.items() if (other := unlike(stated, decisions))}
    if not others:
        return
    if not start_over:
        raise OutputError(f"{store}: {PARTIAL} {next(iter(others.values()))}")
    names = [
        MANIFEST_NAME,
        CONFIG_NAME,
        *found.small,
        *others,
        *(f"{PARTIAL}/{beside(name)}" for name in others),
        CALIBRATION,
    ]
    names += [*(f"{PARTIAL}/{name}{SUFFIX}" for name in others), ENDING]
    store.remove([name for name in names if name in found.files or name in found.small])
    found.files = {name: nbytes for name, nbytes in found.files.items() if name not in names}
    found.journals = {name: each for name, each in found.journals.items() if name not in others}
    found.small, found.kept = [], [name for name in found.kept if name not in names]


def _is_kept(name: str) -> bool:
    """Whether a file is one that goes when the conversion ends."""
    return name in (CALIBRATION, ENDING) or (name.startswith(f"{PARTIAL}/") and name.endswith((SUFFIX, beside(""))))


def _files_of(manifest: bytes) -> list[str]:
    """The files that a manifest names; none where it is not whole."""
    try:
        value = json.loads(manifest)
        return [name for name in (*value["headers"], *value["files"]) if is_inside(name)]
    except (ValueError, KeyError, TypeError):
        return []
