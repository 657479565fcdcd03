"""Every kernel under AddressSanitizer: no byte outside its tensors is read or written.

The sanitizer has to be loaded first in a process, so the checks run in a separate one, as which this file is started as
a script. Tensors are allocated to the exact byte.
"""

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve()
# not the stacks, which fibers leave without returning; nor static shared memory, which is filled with poison in one go
SANITIZED = ("-fsanitize=address", "--param=asan-stack=0", "--param=asan-globals=0", "-g", "-O1")


def sanitizer() -> str:
    return subprocess.run(["g++", "-print-file-name=libasan.so"], capture_output=True, text=True).stdout.strip()


def run_sanitized(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {
        "LD_PRELOAD": sanitizer(),
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0:halt_on_error=1:verify_asan_link_order=0",
        "PYTHONMALLOC": "malloc",
        "PYTHONPATH": os.pathsep.join([str(HERE.parents[1]), str(HERE.parents[2])]),
    }
    command = [sys.executable, str(HERE), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


def test_no_kernel_leaves_its_tensors():
    result = run_sanitized("all")
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.split()[-1] == "done"


@pytest.mark.parametrize("planted", ["short output", "short weight"])
def test_the_sanitizer_sees_one_missing_byte(planted):
    result = run_sanitized(planted)
    assert result.returncode != 0 and "heap-buffer-overflow" in result.stderr


def exact(array):
    """A copy in memory of exactly its size, which the sanitizer guards to the byte."""
    import numpy as np
    import torch

    kind = torch.from_numpy(array).dtype
    libc = ctypes.CDLL(None)
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, (ctypes.c_size_t,)
    place = libc.malloc(max(1, array.nbytes))  # at a multiple of 16
    ctypes.memmove(place, np.ascontiguousarray(array).ctypes.data, array.nbytes)
    buffer = (ctypes.c_char * array.nbytes).from_address(place)
    return torch.frombuffer(buffer, dtype=kind).view(array.shape)


def main(what: str) -> None:
    import numpy as np
    from cuda_on_cpu.emulation import EmulatedGpu

    from quantize8.kernels import cuda as kernels

    random = np.random.default_rng(0)

    def launch(kernel, grid, arguments) -> None:
        EmulatedGpu((9, 0) if kernel.since == kernels.HOPPER else (8, 0), 2, flags=SANITIZED).launch(
            kernel, grid, [exact(each) if isinstance(each, np.ndarray) else each for each in arguments]
        )

    def floats(*shape: int, at: float = 1.0) -> np.ndarray:
        return (random.normal(size=shape) * at).astype(np.float16)

    def codes(*shape: int) -> np.ndarray:
        return random.integers(-127, 128, shape).astype(np.int8)

    def scales(n: int) -> np.ndarray:
        return random.random(n).astype(np.float32)

    missing = {"short output": (0, 1), "short weight": (1, 0)}.get(what, (0, 0))
    for rows, columns in ((70, 104), (3, 37), (2, 4112)):
        tiles = kernels.ceil_div(rows, 64)
        sums = [np.zeros((tiles, columns), np.float32) for _ in range(2)]
        stats = [*sums, np.zeros(columns, np.uint32).view(np.float32), np.zeros(columns, np.int32)]
        weight = floats(rows, columns).reshape(-1)[: rows * columns - missing[0]]
        out = np.zeros(rows * columns - missing[1], np.int8)
        sizes = [rows, columns, kernels.rows_at_once(columns), 64]
        launch(kernels.quantize_rowwise("half", columns, True), (tiles, 1), [weight, out, scales(rows), *stats, *sizes])
        plain = kernels.quantize_rowwise("half", columns, False)
        launch(plain, (kernels.ceil_div(rows, 16), 1), [weight, out, scales(rows), *[None] * 4, *sizes[:3], 16])
        doubles = [np.zeros(columns) for _ in range(2)]
        launch(kernels.add_tiles(), (kernels.ceil_div(columns, 64), 1), [*sums, *doubles, tiles, columns])
        launch(
            kernels.dequantize("half"), (rows, 1), [codes(rows, columns), scales(rows), floats(rows, columns), columns]
        )

    for tokens, columns in ((5, 104), (3, 37), (2, 8208)):
        mask = np.zeros(kernels.ceil_div(columns, 32) + 1, np.int32)
        lists = [mask, np.zeros(columns, np.int32), np.zeros(1, np.int32)]
        x = [floats(tokens, columns, at=4), codes(tokens, columns), scales(tokens)]
        launch(kernels.quantize_activations("half", columns), (tokens, 1), [*x, *lists, 6.0, columns])

    for tokens, columns, rotation in ((3, 16, 16), (2, 2112, 64), (2, 256, 256)):
        x = floats(tokens, columns, at=4)
        rest = [codes(tokens, columns), scales(tokens), None, None, None, 0.0, columns]
        launch(kernels.quantize_activations("half", columns, rotation), (tokens, 1), [x, *rest])
        rotated = np.zeros((tokens, columns), np.float32)
        launch(kernels.rotate("half", rotation), (tokens, 1), [x, rotated, columns])
        operands = [rotated, codes(9, columns), scales(9), floats(9), floats(tokens, 9)]
        launch(kernels.weight_only_any("half", columns, rotated=True), (2, 1), [*operands, tokens, 9, columns])

    for tokens, rows, columns in ((1, 21, 2064), (11, 5, 16), (3, 9, 37)):
        operands = [floats(tokens, columns), codes(rows, columns), scales(rows), floats(rows), floats(tokens, rows)]
        sizes = [tokens, rows, columns]
        if columns % 16 == 0:
            launch(kernels.weight_only("half", tokens), (kernels.ceil_div(rows, 16), 1), [*operands, *sizes])
        launch(kernels.weight_only_any("half", columns), (kernels.ceil_div(rows, 8), 1), [*operands, *sizes])

    for tokens, rows, columns in ((17, 131, 208), (70, 33, 16)):
        outliers = np.sort(random.permutation(columns)[:11]).astype(np.int32)
        x = floats(tokens, columns)
        operands = [codes(tokens, columns), scales(tokens), codes(rows, columns), scales(rows), floats(rows), x]
        rest = [outliers, np.array([11], np.int32), floats(tokens, rows), tokens, rows, columns]
        for tile in (kernels.SMALL_TILE, kernels.LARGE_TILE, kernels.WGMMA_TILE):
            launch(kernels.mixed("half", tile), tile.blocks(tokens, rows), [*operands, *rest])
        sums = random.integers(-9, 9, (tokens, rows + 3)).astype(np.int32)
        grid = (tokens * kernels.ceil_div(rows, 256), 1)
        launch(kernels.mixed_epilogue("half"), grid, [sums, *operands, *rest, rows + 3])
    print("done")


if __name__ == "__main__":
    main(sys.argv[1])
