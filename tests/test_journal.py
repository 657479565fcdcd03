"""The journal of a weight file: what it keeps, what it discards, and which process may use it."""

import errno
import os

import filelock
import pytest

from quantize8.artifact.manifest import Quantized, TensorRecord
from quantize8.destinations.journal import Journal, read_heading

RECORD = TensorRecord("model.safetensors", "I8", (4, 8), "ab" * 32)
FULL = Quantized("F16", "cd" * 32, 0.01, (0.0, 3.25), 2, [(7, 1, 3.25)], scale="mse")
ENTRIES = {"a.weight": {"a.weight": TensorRecord(**vars(RECORD) | {"quantized": FULL})}, "b\n": {"b\n": RECORD}}
HEADING = {"decisions": {"version": "1"}}


@pytest.fixture
def path(tmp_path):
    journal = Journal(tmp_path / "model.safetensors.journal")
    assert journal.heading == journal.entries == {}
    journal.begin(HEADING, {})
    for source, records in ENTRIES.items():
        journal.append(source, records)
    journal.close()
    return journal.path


def reopened(path) -> Journal:
    journal = Journal(path)
    journal.close()
    return journal


def test_what_was_appended_is_read(path):
    journal = reopened(path)
    assert journal.heading == read_heading(path) == HEADING and journal.entries == ENTRIES


@pytest.mark.parametrize("cut", range(1, 400, 7))
def test_every_cut_leaves_whole_lines_which_can_be_gone_on_from(path, cut):
    data = path.read_bytes()
    path.write_bytes(data[:-cut])
    journal = Journal(path)
    assert journal.entries.items() <= ENTRIES.items() and journal.heading in ({}, HEADING)
    journal.begin(HEADING, journal.entries)
    for source in [name for name in ENTRIES if name not in journal.entries]:
        journal.append(source, ENTRIES[source])
    journal.close()
    assert path.read_bytes() == data


@pytest.mark.parametrize("position", range(0, 300, 11))
def test_a_flipped_bit_ends_it(path, position):
    data = bytearray(path.read_bytes())
    data[position] ^= 4
    path.write_bytes(data)
    journal = reopened(path)
    assert journal.entries != ENTRIES and journal.entries.items() <= ENTRIES.items()


def test_another_heading_or_fewer_entries_are_written_anew(path):
    journal = Journal(path)
    journal.begin({"decisions": 2}, {"b\n": ENTRIES["b\n"]})
    journal.close()
    journal = reopened(path)
    assert journal.heading == {"decisions": 2} and journal.entries == {"b\n": ENTRIES["b\n"]}


def test_one_at_a_time(path):
    journal = Journal(path)
    with pytest.raises(BlockingIOError):
        Journal(path)
    journal.close()
    reopened(path)


def test_one_that_was_removed_while_it_was_opened_is_made_anew(path, monkeypatch):
    lock, removed = filelock.lock_descriptor, []

    def late(descriptor, **options):
        if not removed:
            removed.append(path.unlink())
        return lock(descriptor, **options)

    monkeypatch.setattr(filelock, "lock_descriptor", late)
    journal = reopened(path)
    assert removed and journal.entries == {} and path.exists()


def test_file_systems_without_locks(path, monkeypatch):
    def refuses(*_, **__):
        raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))

    monkeypatch.setattr(filelock, "lock_descriptor", refuses)
    assert reopened(path).entries == ENTRIES


def test_a_line_that_does_not_fit_hides_no_other(path, monkeypatch):
    journal, write = Journal(path), os.write
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", lambda descriptor, data: write(descriptor, data[:40]))
        with pytest.raises(OSError, match="No space left"):
            journal.append("c", {"c": RECORD})
    journal.append("d", {"d": RECORD})
    journal.close()
    assert reopened(path).entries == ENTRIES | {"d": {"d": RECORD}}


def test_no_heading(tmp_path):
    assert read_heading(tmp_path / "nothing") == {}
    (tmp_path / "empty").write_bytes(b"")
    assert read_heading(tmp_path / "empty") == {}
