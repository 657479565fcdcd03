"""The Arm units under an emulator: the same integers, and the same bits at prefill and decode as this machine's unit.

Needs qemu-user and a compiler for aarch64 (Debian: qemu-user-static and gcc-aarch64-linux-gnu, or PyPI: ziglang). It
shows that results are right, and nothing about speed.
"""

import importlib.util
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch

from quantize8.kernels import cpu, reference, rounding
from quantize8.kernels.packed import _DTYPES, _MODES, PackedWeight, _second_digits

HERE = Path(__file__).parent
UNITS = {"generic": [], "neon-dotprod": ["-march=armv8.2-a+dotprod"], "neon-i8mm": ["-march=armv8.2-a+dotprod+i8mm"]}
NATIVE = platform.machine() in ("aarch64", "arm64")
EMULATOR = (
    [] if NATIVE else [path for name in ("qemu-aarch64-static", "qemu-aarch64") if (path := shutil.which(name))][:1]
)
GCC = shutil.which("aarch64-linux-gnu-gcc") or (shutil.which("cc") if NATIVE else None)
ZIG = importlib.util.find_spec("ziglang") is not None

pytestmark = [
    pytest.mark.skipif(not (NATIVE or EMULATOR), reason="qemu-user is not installed: the Arm units do not run here"),
    pytest.mark.skipif(not (GCC or ZIG), reason="no compiler for aarch64: install gcc-aarch64-linux-gnu or ziglang"),
]


@pytest.fixture(scope="module", params=UNITS)
def unit(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def driver(unit, tmp_path_factory) -> tuple[str, list[str]]:
    """A unit, and the command that runs a program with this unit compiled in."""
    return unit, compiled(unit, "driver.c", tmp_path_factory.mktemp("arm") / unit)


def compiled(unit: str, source: str, path: Path) -> list[str]:
    compiler = [GCC] if GCC else [sys.executable, "-m", "ziglang", "cc", "-target", "aarch64-linux-musl"]
    define = f"-DUNIT_{unit.upper().replace('-', '_')}"
    flags = ["-std=gnu11", "-O2", "-ffp-contract=off", "-static", "-Wall", "-Wextra", "-Werror", "-Wno-psabi"]
    flags += ["-Wno-unused-function"] if source != "driver.c" else []  # which has all kernels
    command = [*compiler, *flags, define, *UNITS[unit], str(HERE / source), "-o", str(path), "-lm", "-lpthread"]
    subprocess.run(command, check=True, capture_output=True)
    return [*EMULATOR, *(["-cpu", "max"] if EMULATOR else []), str(path)]


def numpy_of(x: torch.Tensor) -> np.ndarray:
    return x.view(torch.int16).numpy().view(ml_dtypes.bfloat16) if x.dtype == torch.bfloat16 else x.numpy()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("mode", ["dynamic", "static", "hybrid"])
@pytest.mark.parametrize("shape", [(3, 45, 131), (16, 33, 64), (17, 70, 577), (70, 64, 200)], ids=str)
def test_an_arm_unit_computes_what_this_machines_does(shape, mode, dtype, driver, tmp_path):
    compare(shape, mode, dtype, 0, driver, tmp_path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rotation", reference.ROTATIONS)
@pytest.mark.parametrize("tokens", [3, 40])
def test_an_arm_unit_rotates_as_this_machines_does(tokens, rotation, dtype, driver, tmp_path):
    compare((tokens, 45, 3 * rotation), "dynamic", dtype, rotation, driver, tmp_path)


def compare(shape, mode, dtype, rotation, driver, tmp_path) -> None:
    """Run a case on an Arm unit and on this machine, and check that the results are equal."""
    unit, command = driver
    tokens, rows, columns = shape
    random = np.random.default_rng(tokens)
    values = random.standard_t(3, (rows, columns)).astype(np.float32)
    values[rows // 2] = 0
    codes, absmax = reference.quantize_rowwise(values)
    x = torch.from_numpy(random.normal(size=(tokens, columns)).astype(np.float32) * random.choice([1, 30], columns))
    x = x.to(dtype)
    x_codes = random.integers(-127, 128, (tokens, columns)).astype(np.int8)
    x_codes[0], codes[0] = 127, -127
    wide, exact = np.zeros(0, np.int64), np.zeros((rows, 0), np.float16)
    weight = [torch.from_numpy(codes), torch.from_numpy(absmax)]
    if mode in reference.STATIC_MODES:
        wide = random.permutation(columns)[:9].astype(np.int64)
        exact = values[:, wide[:4]].astype(np.float16)
    second = _second_digits(*weight, torch.from_numpy(wide[: exact.shape[1]]), torch.from_numpy(exact)).numpy()
    static = (torch.from_numpy(wide), torch.from_numpy(exact)) if mode in reference.STATIC_MODES else ()
    packed = PackedWeight(*weight, None, *static, rotation=rotation)

    sizes = [tokens, rows, columns, len(wide), exact.shape[1]]
    parts = [
        np.array([*sizes, _DTYPES[dtype], _MODES[mode], 2, rotation], np.int64),
        np.float32(6.0),
        codes,
        packed.scale.numpy(),
        numpy_of(x),
        x_codes,
        wide,
        codes[:, wide],
        second,
        values,
    ]
    (tmp_path / "case").write_bytes(b"".join(np.ascontiguousarray(part).tobytes() for part in parts))
    subprocess.run([*command, str(tmp_path / "case"), str(tmp_path / "result")], check=True, timeout=60)

    result, size = (tmp_path / "result").read_bytes(), tokens * rows
    sums_at = size * x.element_size()
    y = torch.frombuffer(bytearray(result[:sums_at]), dtype=dtype).view(tokens, rows)
    sums = np.frombuffer(result, np.int32, size, sums_at).reshape(tokens, rows)
    codes_at = sums_at + 4 * size
    found = np.frombuffer(result, np.int8, rows * columns, codes_at).reshape(rows, columns)
    peaks = np.frombuffer(result, np.float32, rows, codes_at + rows * columns)
    has = int(np.frombuffer(result, np.int32, 1, codes_at + rows * columns + 4 * rows)[0])

    np.testing.assert_array_equal(sums, reference.int8_matmul(x_codes, codes))
    np.testing.assert_array_equal(found[1:], codes[1:])
    np.testing.assert_array_equal(peaks, absmax)
    assert has & cpu._BITS["neon-dotprod"] or NATIVE
    expected = packed.linear(x, None, 6.0, mode)
    if tokens <= reference.DECODE_TOKENS and {unit, cpu.chosen()} & {"avx2", "generic"}:  # which decode in float32
        rounding = 1e-5 * float(expected.abs().max())  # where large terms cancel, what is left is as far off as they
        torch.testing.assert_close(y, expected, rtol=1e-2 if dtype != torch.float32 else 1e-4, atol=rounding)
    else:
        assert torch.equal(y, expected)


@pytest.mark.parametrize("shape", [(150, 1, 3, 1), (300, 130, 70, 2)], ids=str)
def test_an_arm_unit_chooses_the_same_codes(shape, unit, tmp_path):
    tokens, columns, rows, groups = shape
    random = np.random.default_rng(columns)
    x = random.normal(size=(tokens, columns)) @ random.normal(size=(columns, columns)) / columns**0.5
    x = x.astype(ml_dtypes.bfloat16).astype(np.float32)
    weight = random.standard_t(3, (rows, columns)).astype(np.float32)
    scales = np.abs(weight.reshape(rows, groups, -1)).max(axis=2) / np.float32(127)
    order = random.permutation(columns).astype(np.int64)
    parts = [np.array(shape, np.int64), x, weight, scales, order]
    (tmp_path / "case").write_bytes(b"".join(np.ascontiguousarray(part).tobytes() for part in parts))
    command = compiled(unit, "rounding.c", tmp_path / "rounding")
    subprocess.run([*command, str(tmp_path / "case"), str(tmp_path / "result")], check=True, timeout=60)

    result, size = (tmp_path / "result").read_bytes(), columns * columns
    gram = np.frombuffer(result, np.float64, size).reshape(columns, columns)
    factor = np.frombuffer(result, np.float32, size, 8 * size).reshape(columns, columns)
    codes = np.frombuffer(result, np.int8, weight.size, 12 * size).reshape(weight.shape)
    np.testing.assert_array_equal(np.triu(gram), np.triu(rounding.defined_gram(x)))
    damped = np.triu(gram) + np.triu(gram, 1).T + np.eye(columns)
    expected = np.zeros(damped.shape)
    for k in reversed(range(columns)):
        expected[k, k] = np.sqrt(damped[k, k])
        expected[:k, k] = damped[:k, k] / expected[k, k]
        damped[:k, :k] -= np.outer(expected[:k, k], expected[:k, k])
    roots = expected.diagonal().copy()
    expected /= roots
    np.fill_diagonal(expected, roots)
    np.testing.assert_array_equal(factor, expected.astype(np.float32))
    np.testing.assert_array_equal(codes, rounding.defined_codes(weight, scales, order, factor))
