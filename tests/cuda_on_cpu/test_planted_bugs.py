"""The emulator notices the usual bugs in CUDA code: each is planted in a copy of a kernel and must be caught."""

import faulthandler
import os
import shutil
import signal
from collections.abc import Callable

import pytest
import torch
from cuda_on_cpu import test_kernels
from cuda_on_cpu.emulation import SOURCES, EmulatedGpu, LaunchError

from quantize8.kernels import gpu

WAIT = "    wait_copies<STAGES - 2>();\n"
PIPELINE_BARRIER = "    __syncthreads();  // all threads see this stage, and have finished with the previous one\n"
FINISH = "finish<ROWS, COLUMNS>(sums, m0, n0, warp_m, warp_n, product, shared)"
GATHERED = "      gathered[r * OUTLIER_STRIDE + i % OUTLIERS_AT_ONCE] = from_float<FLOAT>(value);\n    }\n"

# file, what stands there, what to put in its place, what is wrong then
ROWWISE = [
    ("quantize_rowwise.cu", "peaks[warp] = peak;\n    __syncthreads();", "peaks[warp] = peak;", "absmax read early"),
    ("quantize_rowwise.cu", "peak = warp_max(peak);", "if (warp < 9) peak = warp_max(peak);",
     "a part of the warps only"),
    ("quantize_rowwise.cu", "if (lane == 0) energies[warp] = energy;\n    __syncthreads();\n",
     "if (lane == 0) energies[warp] = energy;\n", "sums of a row read early"),
    ("quantize_rowwise.cu", "total / columns);\n    }\n    __syncthreads();\n", "total / columns);\n    }\n",
     "limits read early"),
    ("quantize_rowwise.cu", "if (base > start)", "if (false)", "rows before the last ones forgotten"),
    ("quantize_rowwise.cu", "atomicMax(&column_absmax[k + i], top[i]);", "column_absmax[k + i] = 0;", "maximum lost"),
    ("quantize8.cuh", "__fmul_rn(__fdiv_rn(1.f, __uint_as_float(peak)), (float)INT8_MAX)",
     "__fdiv_rn((float)INT8_MAX, __uint_as_float(peak))", "one rounding instead of two"),
]  # fmt: skip
ACTIVATIONS = [
    ("quantize_activations.cu", "atomicOr(&mask[k >> 5], marks << (k & 31));", "mask[k >> 5] = marks << (k & 31);",
     "a store for an atomic operation"),
    ("quantize_activations.cu", "peaks[warp] = peak;\n  __syncthreads();", "peaks[warp] = peak;", "absmax read early"),
    ("quantize_activations.cu", "peaks[warp] = up_to_here;\n    __syncthreads();", "peaks[warp] = up_to_here;",
     "counts of the list read early"),
    ("quantize_activations.cu", "    __syncthreads();  // peaks can be reused\n", "", "counts overwritten early"),
    ("quantize_activations.cu", "+ 1 == gridDim.x", "== 0", "the first block, not the last, makes the list"),
    ("quantize8.cuh", "magnitude(inverse) >= INFINITE ? 0.f : inverse", "inverse", "a token too small for an inverse"),
    ("quantize_activations.cu", ">= threshold;", "> threshold;", "an element at the threshold"),
]  # fmt: skip
ROTATED = [
    ("rotate.cuh", "__fadd_rn(a, -b)", "__fadd_rn(b, -a)", "a difference the wrong way round"),
    ("rotate.cuh", "is_second ? -v[i] : v[i]", "-v[i]", "differences in both lanes"),
    ("rotate.cuh", "h < ROTATION / VECTOR", "h <= ROTATION / VECTOR", "two blocks mixed"),
    ("rotate.cuh", "h < VECTOR; h <<= 1", "h < VECTOR / 2; h <<= 1", "a stage left out"),
    ("rotate.cuh", "threadIdx.x & h;", "threadIdx.x & 1;", "the sign of another stage"),
    ("rotate.cuh", "__fmul_rn(v[i], 1.f / ROTATION_ROOT)", "__fmul_rn(v[i], 1.f / ROTATION)", "another factor"),
    ("quantize_activations.cu", "ROTATION ? lane * VECTOR : 0", "0", "lanes past the end that take no part"),
    ("quantize_activations.cu", "if (ROTATION && k >= columns) continue;\n", "", "codes past the end of a row"),
    ("quantize_activations.cu", "  rotate_vector(v);\n", "", "no rotation"),
    ("rotate.cu", "k - lane * VECTOR < columns", "k < columns", "lanes past the end that take no part"),
    ("rotate.cu", "    if (k >= columns) continue;\n", "", "elements past the end of a row"),
    ("rotate.cu", "rotated + row + k + 4", "rotated + row + k", "half of a vector written twice"),
    ("weight_only_matmul.cu", "using Input = float;", "using Input = FLOAT;", "rotated activations of another type"),
]  # fmt: skip
DECODE = [
    ("weight_only_matmul.cu", "[2 * quad + (i & 1)] = sums[m][i];\n  __syncthreads();",
     "[2 * quad + (i & 1)] = sums[m][i];", "partial sums read early"),
    ("weight_only_matmul.cu", "{top[0], bottom[0], top[1], bottom[1]}", "{top[0], top[1], bottom[0], bottom[1]}",
     "fragments in the wrong order"),
    ("weight_only_matmul.cu", "if (token < M && k < K) pairs", "if (token < M) pairs", "tokens past the end of a row"),
]  # fmt: skip
PREFILL = [
    ("mixed_matmul.cu", WAIT, WAIT.replace("- 2", "- 1"), "copies waited for one stage late"),
    ("mixed_matmul.cu", PIPELINE_BARRIER, "", "no barrier in the pipeline"),
    ("mixed_matmul.cu", "step + STAGES - 1 < steps", "step + STAGES < steps", "the last tile not loaded"),
    ("tiles.cuh", "present ? (int64_t)row", "true ? (int64_t)(is_weight ? r - TILE_M : r)",
     "rows of another block"),
    ("mixed_matmul.cu", "b[j + 1][0] = four[2], b[j + 1][1] = four[3]", "b[j + 1][1] = four[2], b[j + 1][0] = four[3]",
     "fragments in the wrong order"),
    ("outliers.cuh", GATHERED + "    __syncthreads();\n", GATHERED, "outlier columns read early"),
    ("outliers.cuh", "    __syncthreads();  // no thread reads shared memory any more\n", "",
     "shared memory overwritten early"),
]  # fmt: skip
HOPPER = [
    ("mixed_matmul_sm90.cu", "    fence_async_proxy();\n", "", "no proxy fence"),
    ("mixed_matmul_sm90.cu", "c ^ (r & 7)", "c ^ (r & 3)", "another swizzle"),
    ("mixed_matmul_sm90.cu", "(uint64_t)(1024 >> 4) << 32", "(uint64_t)(512 >> 4) << 32", "another stride"),
    ("mixed_matmul_sm90.cu", "    warpgroup_wait();\n", "    if (step + 1 == steps) warpgroup_wait();\n",
     "stages overwritten under a product"),
    ("mixed_matmul_sm90.cu", PIPELINE_BARRIER, "", "no barrier in the pipeline"),
]  # fmt: skip


def check_rowwise(on) -> None:
    for order in (2, 3):
        test_kernels.test_quantize_rowwise(on, torch.float16, 130, 4104, order)
    test_kernels.test_a_row_that_cannot_be_quantized_has_no_finite_absmax_and_spoils_no_other(
        on, torch.float16, float("inf")
    )


def check_activations(on) -> None:
    for order in (2, 3):
        test_kernels.test_quantize_activations(on, torch.float16, 20, 16392, 3000, order)
    test_kernels.test_activations_that_are_not_numbers(on, torch.bfloat16)


def check_rotated(on) -> None:
    for rotation in (16, 64, 256):
        for order in (2, 3):
            test_kernels.test_rotation_bit_for_bit(on, torch.float16, 3, 9 * rotation, rotation, order)
    test_kernels.test_a_rotated_layer_at_decode_and_prefill(on, test_kernels.ROTATED[1], 16)


def check_decode(on) -> None:
    test_kernels.test_weight_only_matmul(on, (8, 0), torch.float16, 21, 2064, 9)
    test_kernels.test_weight_only_matmul(on, (8, 0), torch.float16, 21, 2064, 11)


def check_prefill(on) -> None:
    case = ((8, 0), 1, torch.float16, 130, 200, 400, 40, "")
    test_kernels.test_mixed_matmul(on, case, 3)
    test_kernels.test_mixed_matmul(on, case, 1)


def check_hopper(on) -> None:
    case = ((9, 0), 1, torch.float16, 130, 300, 1040, 5, "")
    test_kernels.test_mixed_matmul(on, case, 3)


def passes_in_a_child(check: Callable[[], None]) -> bool:
    """A bug may write anywhere, so it runs in a separate process. A crash, or no end within a minute, is a failure."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            signal.alarm(60)
            faulthandler.disable()  # a crash is expected, not news
            torch.set_num_threads(1)  # the parent's threads are not there after a fork
            check()
            code = 0
        except (AssertionError, LaunchError):
            pass
        finally:
            os._exit(code)
    return os.waitpid(child, 0)[1] == 0


PLANTED = [
    *((check_rowwise, *bug) for bug in ROWWISE),
    *((check_activations, *bug) for bug in ACTIVATIONS),
    *((check_rotated, *bug) for bug in ROTATED),
    *((check_decode, *bug) for bug in DECODE),
    *((check_prefill, *bug) for bug in PREFILL),
    *((check_hopper, *bug) for bug in HOPPER),
]


def _name(value: object) -> str:
    return getattr(value, "__name__", str(value))[:40]  # without addresses: two processes call a test alike


@pytest.mark.parametrize(("check", "file", "right", "wrong", "what"), PLANTED, ids=_name)
def test_a_planted_bug_is_caught(monkeypatch, tmp_path, check, file, right, wrong, what):
    folder = tmp_path / "cuda"
    shutil.copytree(SOURCES, folder)
    text = (folder / file).read_text()
    assert right in text, "the kernel has changed: plant the bug anew"
    (folder / file).write_text(text.replace(right, wrong))

    def on(capability=(8, 0), order=0, processors=4) -> EmulatedGpu:
        emulated = EmulatedGpu(capability, order, processors, sources=folder)
        monkeypatch.setattr(gpu, "gpu_of", lambda index: emulated)
        return emulated

    assert not passes_in_a_child(lambda: check(on)), what


@pytest.mark.parametrize(
    "check", [check_rowwise, check_activations, check_rotated, check_decode, check_prefill, check_hopper]
)
def test_the_checks_pass_on_the_kernels_as_they_are(monkeypatch, check):
    def on(capability=(8, 0), order=0, processors=4) -> EmulatedGpu:
        emulated = EmulatedGpu(capability, order, processors)
        monkeypatch.setattr(gpu, "gpu_of", lambda index: emulated)
        return emulated

    assert passes_in_a_child(lambda: check(on))


def test_the_documentation_counts_them_right():
    page = (SOURCES.parent / "docs" / "benchmarks.md").read_text()
    assert f"catches {len(PLANTED)} planted mistakes" in page
