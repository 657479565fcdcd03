"""The memory that a process uses, and its peak after memory was released."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil

from quantize8.memory import peak_rss

SIZE = 200 * 2**20


def test_what_was_let_go_of_counts():
    before = psutil.Process().memory_info().rss
    held = np.ones(SIZE, np.uint8)
    assert peak_rss() > before + 0.9 * held.nbytes
    del held
    assert peak_rss() > before + 0.9 * SIZE


def test_a_system_that_keeps_no_peak(monkeypatch):
    monkeypatch.setattr(Path, "read_text", lambda *_, **__: "VmRSS: 1 kB\n")
    monkeypatch.setattr(psutil, "Process", lambda: SimpleNamespace(memory_info=lambda: SimpleNamespace(rss=7)))
    assert peak_rss() == 7


def test_windows_keeps_a_peak_of_its_own(monkeypatch):
    def missing(*_: object, **__: object) -> str:
        raise FileNotFoundError

    monkeypatch.setattr(Path, "read_text", missing)
    found = SimpleNamespace(rss=7, peak_wset=9)
    monkeypatch.setattr(psutil, "Process", lambda: SimpleNamespace(memory_info=lambda: found))
    assert peak_rss() == 9
