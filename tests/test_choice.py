"""Choosing the device: requested, available, and correct. Without a GPU, a stub answers in its place."""

import sys
import types
import warnings
from contextlib import nullcontext

import pytest
import torch
from cuda_on_cpu.emulation import EmulatedGpu

from quantize8 import DependencyError
from quantize8.errors import DeviceWarning
from quantize8.kernels import cuda as kernels
from quantize8.kernels import devices as choice
from quantize8.kernels import gpu, launch
from quantize8.kernels.launch import Gpu, gpu_of, why_not


@pytest.fixture(autouse=True)
def fresh():
    choice.problem.cache_clear()
    gpu_of.cache_clear()
    yield
    choice.problem.cache_clear()
    gpu_of.cache_clear()


@pytest.fixture
def a_gpu(monkeypatch):
    """Make torch report a GPU."""

    def pretend(capability=(9, 0), version="13.0", available=True) -> None:
        monkeypatch.setattr(torch.version, "cuda", version)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
        monkeypatch.setattr(choice, "_has_driver", lambda: True)
        monkeypatch.setattr("quantize8.kernels.nvrtc.load_nvrtc", lambda: None)

    return pretend


def test_reasons_not_to_use_a_gpu(a_gpu, monkeypatch):
    a_gpu(version=None)
    assert "built without CUDA" in why_not()
    a_gpu(available=False)
    assert "no NVIDIA GPU or driver" in why_not()
    a_gpu(capability=(7, 0))
    assert "capability 7.0, kernels need 7.5" in why_not()
    a_gpu()
    assert why_not() is None
    monkeypatch.undo()


def test_without_cupy_the_reason_says_what_to_install(a_gpu, monkeypatch):
    a_gpu()
    monkeypatch.undo()
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    for name in ("cupy", "cupy.cuda"):
        monkeypatch.setitem(sys.modules, name, None)
    assert "pip install 'quantize8[cuda12]'" in why_not()
    with pytest.raises(DependencyError, match="cuda12"):
        gpu_of(0)


def test_the_device_asked_for(monkeypatch):
    assert choice.resolve("cpu") == "cpu"
    monkeypatch.setattr(choice, "_has_driver", lambda: False)
    assert choice.resolve("auto") == "cpu"
    with pytest.raises(DependencyError, match="device tpu: unknown; use auto, cpu or cuda"):
        choice.resolve("tpu")
    monkeypatch.setattr(choice, "_has_driver", lambda: True)
    monkeypatch.setattr(choice, "problem", lambda: None)
    assert choice.resolve("auto") == choice.resolve("cuda") == "cuda"
    monkeypatch.setattr(choice, "problem", lambda: "device cuda: is broken; fix it, or use --device cpu")
    with pytest.raises(DependencyError, match="is broken; fix it, or use --device cpu"):
        choice.resolve("cuda")
    with pytest.warns(
        DeviceWarning, match="^device cuda: is broken; fix it, or use --device cpu; using the CPU instead$"
    ):
        assert choice.resolve("auto") == "cpu"


@pytest.mark.parametrize("capability", [(7, 5), (8, 0), (9, 0)])
def test_kernels_agree_with_the_reference(monkeypatch, capability):
    emulated = EmulatedGpu(capability, processors=2)
    monkeypatch.setattr(gpu, "gpu_of", lambda index: emulated)
    assert choice.disagreement(None) is None
    assert "mixed_matmul" in emulated.launched or "mixed_epilogue" in emulated.launched


@pytest.mark.parametrize(
    ("entry", "outputs", "named"),
    [
        ("quantize_rowwise", [1, 2], "quantize_rowwise"),
        ("add_tiles", [], "column_stats"),
        ("weight_only_matmul", [4], "weight_only_matmul"),
        ("quantize_activations", [1, 2, 4, 5], "mixed_matmul"),
        ("mixed_matmul", [8], "mixed_matmul"),
    ],
)
def test_a_kernel_that_does_nothing_is_named(monkeypatch, a_gpu, entry, outputs, named):
    emulated = EmulatedGpu()
    launch = emulated.launch

    def without(kernel, grid, arguments) -> None:
        if kernel.entry != entry:
            launch(kernel, grid, arguments)
        for place in outputs if kernel.entry == entry else ():
            arguments[place].zero_()

    emulated.launch = without
    monkeypatch.setattr(gpu, "gpu_of", lambda index: emulated)
    assert choice.disagreement(None) == named
    a_gpu()
    monkeypatch.setattr(choice, "disagreement", lambda index: named)
    assert f"kernel {named} on GPU 0 differs from the reference" in choice.problem()


class FakeDriver(types.SimpleNamespace):
    """Records what the driver is asked to do."""

    CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES = 8

    def __init__(self) -> None:
        super().__init__(calls=[], context=0)

    def ctxGetCurrent(self):
        return self.context

    def moduleLoadData(self, code):
        self.calls.append(("load", code))
        return 11

    def moduleGetFunction(self, module, name):
        return 22

    def funcSetAttribute(self, function, attribute, value):
        self.calls.append(("shared", value))

    def launchKernel(self, *arguments):
        self.calls.append(("launch", *arguments[:9]))


@pytest.fixture
def fake_gpu(monkeypatch) -> tuple[Gpu, FakeDriver]:
    """A Gpu on a driver that only records calls: tests how launches are made, not what they do."""
    driver = FakeDriver()
    runtime = types.SimpleNamespace(free=lambda _: setattr(driver, "context", 5))
    cupy_cuda = types.SimpleNamespace(driver=driver, runtime=runtime)
    monkeypatch.setitem(sys.modules, "cupy", types.SimpleNamespace(cuda=cupy_cuda))
    monkeypatch.setitem(sys.modules, "cupy.cuda", cupy_cuda)
    properties = types.SimpleNamespace(name="fake", major=9, minor=0, multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device", lambda index: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda index: types.SimpleNamespace(cuda_stream=777))
    monkeypatch.setattr(launch.nvrtc, "cubin", lambda kernel, architecture: architecture.encode())
    return Gpu(0), driver


def test_a_launch_is_put_on_torchs_stream_and_code_is_loaded_once(fake_gpu):
    found, driver = fake_gpu
    kernel = kernels.mixed("half", kernels.WGMMA_TILE)
    for _ in range(2):
        found.launch(kernel, (3, 2), [torch.zeros(1), None, 5, 0.5])
    launch = ("launch", 22, 3, 2, 1, 256, 1, 1, kernel.shared_bytes, 777)
    assert driver.calls == [("load", b"sm_90a"), ("shared", kernel.shared_bytes), launch, launch]
    assert (found.capability, found.processors, driver.context) == ((9, 0), 132, 5)


def test_a_launch_on_another_gpu_than_torchs_current_one(fake_gpu, monkeypatch):
    found, driver = fake_gpu
    entered = []
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "device", lambda index: nullcontext(entered.append(index)))
    found.launch(kernels.dequantize("half"), (1, 1), [])
    assert entered == [0] and driver.calls[-1][0] == "launch"


def test_small_kernels_ask_for_no_shared_memory(fake_gpu):
    found, driver = fake_gpu
    found.launch(kernels.dequantize("half"), (1, 1), [])
    assert [call[0] for call in driver.calls] == ["load", "launch"]


def test_arguments_are_packed_as_the_driver_reads_them():
    import ctypes

    tensor = torch.arange(3)
    pointers, keep = kernels.pack([tensor, None, -2, 2**40, 1.5])
    assert ctypes.cast(pointers[0], ctypes.POINTER(ctypes.c_void_p))[0] == tensor.data_ptr()
    assert ctypes.cast(pointers[1], ctypes.POINTER(ctypes.c_void_p))[0] is None
    assert ctypes.cast(pointers[2], ctypes.POINTER(ctypes.c_int))[0] == -2
    assert ctypes.cast(pointers[3], ctypes.POINTER(ctypes.c_int64))[0] == 2**40
    assert ctypes.cast(pointers[4], ctypes.POINTER(ctypes.c_float))[0] == 1.5
    del keep


def test_the_command_line_shows_a_warning_in_one_line(capsys, monkeypatch):
    from quantize8 import cli

    monkeypatch.setattr(cli, "app", lambda arguments: warnings.warn("no GPU\nhere", DeviceWarning, stacklevel=1))
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        cli.main()
    assert capsys.readouterr().err == "warning: no GPU here\n"
