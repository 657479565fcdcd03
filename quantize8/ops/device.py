"""A GPU as the kernels see it: what it is, and launching them on torch's current stream through CuPy's driver calls."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

from quantize8.errors import DependencyError
from quantize8.ops import nvrtc
from quantize8.ops.kernels import MINIMUM, Kernel, pack
from quantize8.optional import problem

if TYPE_CHECKING:
    from torch import Tensor

_DEFAULT_SHARED_BYTES = 48 * 1024  # a kernel that wants more has to say so to the driver first


class Gpu:
    """One NVIDIA GPU, by torch's index. Kernels are compiled when first launched on it."""

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
        """Put a kernel on torch's current stream of this GPU; does not wait for it."""
        if self._torch.current_device() == self.index:
            self._launch(kernel, grid, arguments)
        else:
            with self._torch.device(self.index):
                self._launch(kernel, grid, arguments)

    def _launch(self, kernel: Kernel, grid: tuple[int, int], arguments: Sequence[Any]) -> None:
        if not self._driver.ctxGetCurrent():  # a new thread has none until the runtime is asked for something
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
    """The GPU of an index; raises DependencyError where kernels cannot run on it."""
    if reason := why_not(index):
        raise DependencyError(reason)
    return Gpu(index)


def why_not(index: int = 0) -> str | None:
    """One line on what keeps kernels from running on a GPU and how to fix it; None where nothing does."""
    if reason := problem("for --device cuda", "torch"):
        return reason
    import torch

    if torch.version.cuda is None:
        return "device cuda: torch was built without CUDA; install a CUDA build of torch, or use --device cpu"
    if not torch.cuda.is_available():
        return "device cuda: torch sees no NVIDIA GPU or driver; fix that, or use --device cpu"
    capability = torch.cuda.get_device_capability(index)
    if capability < MINIMUM:
        found, needed = (".".join(map(str, each)) for each in (capability, MINIMUM))
        return f"device cuda: GPU {index} has compute capability {found}, kernels need {needed}; use --device cpu"
    try:
        nvrtc.load_nvrtc()
    except DependencyError as error:
        return f"device cuda: {error}"
    return None
