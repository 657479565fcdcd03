"""Every kernel compiles for every architecture without spilling registers; compiled code is cached and found again."""

import json
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from quantize8 import DependencyError
from quantize8.kernels import cuda as kernels
from quantize8.kernels import nvrtc
from quantize8.kernels.cuda import Kernel

RECORD = Path(__file__).parent / "cuda_on_cpu" / "resources.json"
HAS_CUPY = pytest.mark.skipif(
    __import__("importlib.util").util.find_spec("cupy") is None,
    reason="CuPy is not installed, so no kernel can be compiled: pip install 'quantize8[cuda13]'",
)


def capability(architecture: str) -> kernels.Capability:
    digits = architecture.removeprefix("sm_").removesuffix("a")
    return int(digits[:-1]), int(digits[-1])


def label(kernel: Kernel) -> str:
    sizes = "".join(f" {name.lower()}={value}" for name, value in kernel.defines if name != "TENSOR_CORES")
    return f"{kernel.file} {kernel.number}{sizes}" + ("" if kernel.aligned else " unaligned")


@pytest.fixture(scope="module")
def compiled() -> dict[str, dict[str, str]]:
    """Registers, shared memory and spills of each kernel for each architecture that runs it."""
    work = [
        (kernel, architecture)
        for kernel in kernels.all_kernels()
        for architecture in kernels.ARCHITECTURES
        if kernel.runs_on(capability(architecture))
    ]

    def measure(item: tuple[Kernel, str]) -> str:
        _, log = nvrtc.compile_kernel(*item)
        assert "warning" not in log.lower() and "serialized" not in log, log
        registers, spills = re.search(r"Used (\d+) registers", log)[1], re.search(r"(\d+) bytes spill stores", log)[1]
        static = re.search(r"(\d+) bytes smem", log)
        shared = (int(static[1]) if static else 0) + item[0].shared_bytes
        return f"{registers} registers, {shared} bytes shared, {spills} spilled"

    with ThreadPoolExecutor(2) as pool:
        found: dict[str, dict[str, str]] = {}
        for (kernel, architecture), line in zip(work, pool.map(measure, work), strict=True):
            found.setdefault(label(kernel), {})[architecture] = line
    return found


@HAS_CUPY
def test_every_kernel_compiles_for_every_architecture_without_spills(compiled):
    assert {architecture for each in compiled.values() for architecture in each} == set(kernels.ARCHITECTURES)
    assert not [
        (name, each) for name, each in compiled.items() if any(", 0 spilled" not in line for line in each.values())
    ]


@HAS_CUPY
def test_registers_and_shared_memory_are_the_recorded_ones(compiled):
    """A change here is a change in speed: review it, then delete the record and run this test to rewrite it."""
    if nvrtc.load_nvrtc().getVersion() != (13, 0):
        pytest.skip("the record is of NVRTC 13.0")
    if not RECORD.exists():
        RECORD.write_text(json.dumps(compiled, indent=1) + "\n")
    assert compiled == json.loads(RECORD.read_text())


def test_blocks_fit_the_multiprocessors_they_are_meant_for():
    record = json.loads(RECORD.read_text())
    for name, each in record.items():
        for architecture, line in each.items():
            registers, shared = (int(number) for number in re.findall(r"(\d+) (?:registers|bytes)", line))
            threads = next(kernel.threads for kernel in kernels.all_kernels() if label(kernel) == name)
            limit = {"sm_75": 65, "sm_80": 163, "sm_90a": 227, "sm_100": 227}.get(architecture, 99)
            assert registers * threads <= 65536 and shared <= limit * 1024, (name, architecture)


@HAS_CUPY
def test_a_kernel_for_an_unknown_gpu_says_so():
    with pytest.raises(DependencyError, match=r"sm_999: NVRTC \d+\.\d+ does not know this GPU"):
        nvrtc.compile_kernel(kernels.dequantize("half"), "sm_999")


@HAS_CUPY
def test_a_kernel_that_does_not_compile_shows_the_compilers_words(monkeypatch):
    monkeypatch.setattr(nvrtc, "_source", lambda kernel: "int x = nonsense;")
    with pytest.raises(DependencyError, match="nonsense"):
        nvrtc.compile_kernel(kernels.dequantize("half"), "sm_80")


@HAS_CUPY
def test_machine_code_is_kept_and_found_again(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    kernel = kernels.dequantize("half")
    code = nvrtc.cubin(kernel, "sm_80")
    (kept,) = (tmp_path / "quantize8" / "kernels").iterdir()
    assert kept.read_bytes() == code and code[:4] == b"\x7fELF"
    monkeypatch.setattr(nvrtc, "compile_kernel", None)
    assert nvrtc.cubin(kernel, "sm_80") == code
    with pytest.raises(TypeError):  # another architecture, and a change in the source, are compiled anew
        nvrtc.cubin(kernel, "sm_90a")
    monkeypatch.setattr(nvrtc, "_source", lambda kernel: "changed")
    with pytest.raises(TypeError):
        nvrtc.cubin(kernel, "sm_80")


@HAS_CUPY
def test_a_cache_that_cannot_be_written_costs_only_time(tmp_path, monkeypatch):
    (tmp_path / "quantize8").write_text("in the way")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert nvrtc.cubin(kernels.dequantize("half"), "sm_80")[:4] == b"\x7fELF"


def test_without_cupy_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "cupy", None)
    monkeypatch.setitem(__import__("sys").modules, "cupy.cuda", None)
    with pytest.raises(DependencyError, match=r"^CuPy: .*; pip install 'quantize8\[cuda13\]'$"):
        nvrtc.load_nvrtc()


@pytest.mark.parametrize(("cuda", "extra"), [("12.8", "cuda12"), ("13.0", "cuda13"), (None, "cuda13")])
def test_the_extra_is_the_one_for_torchs_cuda(monkeypatch, cuda, extra):
    monkeypatch.setattr(torch.version, "cuda", cuda)
    assert extra in nvrtc.advice()
