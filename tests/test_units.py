"""Which int8 units are offered, and what a unit computes by itself. test_packed.py holds products to the reference."""

import platform
import sys

import pytest
from llvmlite import binding

from quantize8.ops import units


@pytest.fixture
def offered(monkeypatch):
    """The units offered on a processor with these features, if Linux gives the tiles."""

    def ask(features: set[str], machine: str = "x86_64", system: str = "linux", permitted: bool = True):
        monkeypatch.setattr(platform, "machine", lambda: machine)
        monkeypatch.setattr(sys, "platform", system)
        monkeypatch.setattr(binding, "get_host_cpu_features", lambda: dict.fromkeys(features, True))
        if system == "linux":
            monkeypatch.setattr(units, "_may_use_tiles", lambda: permitted)
        return units.available.__wrapped__()

    return ask


ALL = {"avx512f", "avx512vnni", "amx-int8", "amx-tile"}


def test_amx_comes_before_vnni(offered):
    assert offered(ALL) == ("amx", "vnni")


@pytest.mark.parametrize("missing", [{"permitted": False}, {"system": "win32"}])
def test_without_the_systems_permission_for_tiles_vnni_serves(offered, missing):
    assert offered(ALL, **missing) == ("vnni",)


def test_a_processor_of_another_kind_or_age_has_none(offered):
    assert offered(ALL, machine="aarch64") == ()
    assert offered({"avx2", "avxvnni"}) == ()
    assert offered({"avx512f"}) == ()


@pytest.mark.skipif("amx" not in units.available(), reason="this processor has no AMX, or its system keeps it")
def test_asking_linux_twice_for_tiles_is_harmless():
    assert units._may_use_tiles() and units._may_use_tiles()
