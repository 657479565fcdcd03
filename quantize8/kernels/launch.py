"""One GPU: its properties, and launching kernels on torch's current stream through CuPy's bindings of the driver."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

from quantize8.errors import DependencyError
from quantize8.kernels import nvrtc
from quantize8.kernels.cuda import MINIMUM, Kernel, pack
from quantize8.optional import problem

if TYPE_CHECKING:
    from torch import Tensor

_DEFAULT_SHARED_BYTES = 48 * 1024  # a kernel that needs more must request it from the driver first


class Gpu:
    """One NVIDIA GPU, by torch's index. A kernel is compiled when it is first launched on this GPU."""

    def __init__(self, index: int) -> None:
        import torch
        from cupy.cuda import driver, runtime

        properties = torch.cuda.get_device_properties(index)
        self.index = index
        self.capability = (properties.major, properties.minor)
        self.processors = properties.multi_processor_count
        self._torch, self._driver, self._runtime = torch.cuda, driver, runtime
        self._functions: dict[Kernel, int] = {}
        self._loading = threading.Lock()

    def launch(self, kernel: Kernel, grid: tuple[int, int], arguments: Sequence[Tensor | int | float | None]) -> None:
        """Launch a kernel on torch's current stream of this GPU, without waiting for it.

        Args:
            kernel: The kernel, compiled now if this is its first launch.
            grid: Number of blocks in x and y.
            arguments: Tensors on this GPU, numbers, or None (a null pointer), in the order of the kernel's parameters.

        Raises:
            DependencyError: The kernel cannot be compiled.
        """
        if self._torch.current_device() == self.index:
            self._launch(kernel, grid, arguments)
        else:
            with self._torch.device(self.index):
                self._launch(kernel, grid, arguments)

    def _launch(self, kernel: Kernel, grid: tuple[int, int], arguments: Sequence[Any]) -> None:
        if not self._driver.ctxGetCurrent():  # a new thread has no context until it first calls the runtime
            self._runtime.free(0)
        function = self._functions.get(kernel) or self._load(kernel)
        pointers, keep = pack(arguments)
        stream = self._torch.current_stream(self.index).cuda_stream
        self._driver.launchKernel(
            function, *grid, 1, kernel.threads, 1, 1, kernel.shared_bytes, stream, ctypes.addressof(pointers), 0
        )
        del keep  # the driver has copied the arguments

    def _load(self, kernel: Kernel) -> int:
        with self._loading:
            if kernel not in self._functions:
                module = self._driver.moduleLoadData(nvrtc.cubin(kernel, kernel.architecture(self.capability)))
                function = self._driver.moduleGetFunction(module, kernel.entry)
                if kernel.shared_bytes > _DEFAULT_SHARED_BYTES:
                    limit = self._driver.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
                    self._driver.funcSetAttribute(function, limit, kernel.shared_bytes)
                self._functions[kernel] = int(function)
            return self._functions[kernel]


@cache
def gpu_of(index: int) -> Gpu:
    """The GPU of torch's index; raises DependencyError if kernels cannot run on it."""
    if reason := why_not(index):
        raise DependencyError(reason)
    return Gpu(index)


def why_not(index: int = 0) -> str | None:
    """One line on why kernels cannot run on the GPU of this index and how to fix it; None if they can."""
    if reason := problem("for --device cuda", "torch"):
        return reason
    import torch

    if torch.version.cuda is None:
        return "device cuda: torch was built without CUDA; install a CUDA build of torch, or use --device cpu"
    if not torch.cuda.is_available():
        return "device cuda: torch finds no NVIDIA GPU or driver; check both, or use --device cpu"
    capability = torch.cuda.get_device_capability(index)
    if capability < MINIMUM:
        actual, needed = (".".join(map(str, version)) for version in (capability, MINIMUM))
        return f"device cuda: GPU {index} has compute capability {actual}, kernels need {needed}; use --device cpu"
    try:
        nvrtc.load_nvrtc()
    except DependencyError as error:
        return f"device cuda: {error}"
    return None
