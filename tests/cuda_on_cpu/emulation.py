"""Builds kernels with g++ against the emulator, and launches them with the arguments that a GPU would get."""

import ctypes
import hashlib
import os
import subprocess
import threading
from functools import cache
from pathlib import Path

from quantize8.files import resource_dir
from quantize8.kernels.cuda import Capability, Kernel, pack

HERE = Path(__file__).parent
SOURCES = resource_dir("cuda")
ORDERS = (0, 1, 2, 3)  # of threads: ascending, descending, pseudo-random, each warp as far as it gets
_FLAGS = ("-std=c++17", "-O1", "-fPIC", "-shared", "-ffp-contract=off", "-fno-strict-aliasing", "-fno-gnu-unique")
_WARNINGS = ("-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-Wno-unused-function", "-Wno-unused-parameter")


_ONE_LAUNCH = threading.Lock()  # a library holds the state of one block


class LaunchError(Exception):
    """What the emulator found wrong."""


class EmulatedGpu:
    """Replaces `launch.Gpu`: tensors are in main memory, and a launch has ended when it returns."""

    index = 0

    def __init__(
        self,
        capability: Capability = (8, 0),
        order: int = 0,
        processors: int = 4,
        sources: Path = SOURCES,
        flags: tuple[str, ...] = (),
    ) -> None:
        self.capability, self.order, self.processors = capability, order, processors
        self.sources, self.flags = sources, flags
        self.launched: list[str] = []

    def launch(self, kernel: Kernel, grid: tuple[int, int], arguments, first_block: int = 0) -> None:
        assert kernel.runs_on(self.capability), (kernel, self.capability)
        assert min(grid) > 0 and grid[1] < 65536
        self.launched.append(kernel.entry)
        library = build(kernel, self.sources, self.flags)
        entry = getattr(library, f"{kernel.entry}_entry")
        pointers, keep = pack(arguments)
        sizes = (*grid, kernel.threads, kernel.shared_bytes)
        with _ONE_LAUNCH:
            problem = library.emulator_launch(entry, pointers, *sizes, self.order, first_block)
        del keep
        if problem:
            raise LaunchError(f"{kernel.entry}: {problem.decode()}")


@cache
def build(kernel: Kernel, sources: Path = SOURCES, extra: tuple[str, ...] = ()) -> ctypes.CDLL:
    """The kernel as a shared library. Needs g++, which is available wherever Python packages are built."""
    content = hashlib.sha256(repr((kernel.options, kernel.file, extra)).encode())
    for path in (sources / kernel.file, *sorted(sources.glob("*.cuh")), HERE / "emulator.h"):
        content.update(path.read_bytes())
    folder = HERE / ".build"
    library = folder / f"{Path(kernel.file).stem}-{content.hexdigest()[:16]}.so"
    if not library.exists():
        folder.mkdir(exist_ok=True)
        text = f'#include "{sources / kernel.file}"\nEXPORT({kernel.entry})\n'
        command = ["g++", *_FLAGS, *_WARNINGS, *extra, *kernel.options, "-DQUANTIZE8_EMULATOR", f"-I{HERE}"]
        made = library.with_suffix(f".{os.getpid()}.{threading.get_ident()}.part")  # others may build the same one
        subprocess.run([*command, "-x", "c++", "-", "-o", str(made)], input=text, text=True, check=True)
        made.rename(library)
    loaded = ctypes.CDLL(str(library))
    loaded.emulator_launch.restype = ctypes.c_char_p
    return loaded
