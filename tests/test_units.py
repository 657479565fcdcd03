"""Which int8 units are offered and chosen. test_cpu.py and test_packed.py compare their results with the reference."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from quantize8 import DependencyError
from quantize8.kernels import cpu, packed, q8_0, reference

SOURCES = Path(__file__).parent.parent / "cpu"


def chosen(**environment: str) -> subprocess.CompletedProcess[str]:
    """The unit that a new process chooses."""
    script = "from quantize8.kernels import cpu; print(cpu.chosen(), *cpu.available())"
    rest = {name: value for name, value in os.environ.items() if name != cpu.VARIABLE}
    command = [sys.executable, "-c", script]
    return subprocess.run(command, env=rest | environment, capture_output=True, text=True)


def test_the_fastest_unit_is_chosen_and_any_processor_has_one():
    first, *found = chosen().stdout.split()
    assert first == found[0] and found[-1] == "generic"
    assert tuple(found) == tuple(unit for unit in cpu.UNITS if unit in found)


@pytest.mark.parametrize("unit", cpu.available())
def test_a_unit_can_be_forced(unit):
    assert chosen(QUANTIZE8_UNIT=unit).stdout.split()[0] == unit


@pytest.mark.parametrize("name", ["neon-i8mm" if "avx2" in cpu.available() else "amx", "AVX2", "mmx"])
def test_a_forced_unit_that_is_not_here_is_an_error_that_names_what_is(name):
    message = chosen(QUANTIZE8_UNIT=name).stderr.splitlines()[-1]
    assert f"QUANTIZE8_UNIT={name}: not available here; set it to one of {cpu.available()[0]}" in message


def test_what_linux_says_of_the_processor_is_what_is_offered():
    flags = Path("/proc/cpuinfo").read_text().split()
    names = {"avx2": "avx2", "avx_vnni": "avxvnni", "avx512_vnni": "avx512vnni", "asimddp": "neon-dotprod",
             "i8mm": "neon-i8mm"}  # fmt: skip
    for flag, unit in names.items():
        assert (flag in flags) == (unit in cpu.available()), unit
    assert "amx" not in cpu.available() or "amx_int8" in flags


def test_the_library_of_a_unit_that_is_not_here_is_not_loaded():
    absent = next(unit for unit in cpu.UNITS if unit not in cpu.available())
    with pytest.raises(DependencyError, match=f"unit {absent}: not available here"):
        cpu.library(absent)


def test_another_choice_is_another_library(monkeypatch):
    found = set()
    for unit in cpu.available():
        monkeypatch.setattr(cpu, "chosen", lambda unit=unit: unit)
        found.add(cpu.library()._name)
    assert len(found) == len(cpu.available())


def test_kernels_that_are_not_compiled_are_told_of_in_one_line(monkeypatch, tmp_path):
    monkeypatch.setattr(cpu, "_FOLDER", tmp_path)
    with pytest.raises(DependencyError, match=r"generic\.\w+: the CPU kernels are not compiled .*build.py"):
        cpu.available.__wrapped__()


def test_constants_of_c_are_those_of_python():
    """C cannot import them, so both sides have to be changed together."""
    text = "".join(path.read_text() for path in sorted(SOURCES.glob("*.[ch]")))
    found = {
        name: value.split("/*")[0].strip() for name, value in re.findall(r"^#define (\w+) (.+)$", text, re.MULTILINE)
    }
    assert float(found["TOKEN_SIGMAS"].rstrip("f")) == reference.TOKEN_SIGMAS
    assert float.fromhex(found["LEAST_SQUARES"].rstrip("f")) == reference.LEAST_SQUARES
    for name, value in {
        "DECODE_TOKENS": reference.DECODE_TOKENS,
        "INT8_MAX_CODE": reference.INT8_MAX,
        "OUTLIER_SIGMAS": reference.OUTLIER_SIGMAS,
        "STATS_TILE_ROWS": reference.STATS_TILE_ROWS,
        "BLOCK_N": cpu.BLOCK_N,
        "STEP_K": cpu.STEP_K,
        "GROUP_K": cpu.GROUP_K,
        "DIGIT_BASE": packed._SECOND_DIGIT,
        "Q8_0_BLOCK": q8_0.BLOCK,
        "Q8_0_BYTES": q8_0.BLOCK_BYTES,
    }.items():
        assert int(found[name]) == value, name
    numbers = {
        **packed._MODES,
        **{str(dtype).removeprefix("torch."): number for dtype, number in packed._DTYPES.items()},
    }
    names = re.search(r"enum dtype \{(.*?)\}", text)[1] + "," + re.search(r"enum mode \{(.*?)\}", text)[1]
    order = [name.strip().lower() for name in names.split(",")]
    assert {name: order.index(name) % 3 if "float" in name else order.index(name) - 3 for name in order} == numbers
    bits = re.search(r"enum unit \{(.*?)\}", text)[1].lower().replace("_", "-").replace(" ", "").split(",")
    assert dict(pair.split("=") for pair in bits) == {unit: str(bit) for unit, bit in cpu._BITS.items() if bit}


def test_memory_that_is_short_is_an_error():
    cpu.check(0)
    with pytest.raises(MemoryError, match="not enough memory"):
        cpu.check(-1)
