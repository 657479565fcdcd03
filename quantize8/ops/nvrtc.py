"""CUDA sources to machine code with NVRTC, kept in a cache of our own.

CuPy's `RawModule` compiles for the GPU at hand only, and cannot ask for Hopper's own instructions (sm_90a), so NVRTC is
called directly. That needs no GPU either: a test compiles every kernel for every architecture.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
import threading
from functools import cache
from pathlib import Path
from typing import Any

from quantize8.errors import DependencyError, first_line
from quantize8.ops.kernels import Kernel
from quantize8.resources import cache_dir, resource_dir

_OPTIONS = ("-std=c++17", "-default-device", "--ptxas-options=-v", "--ptxas-options=-warn-spills")
_OPENING = threading.Lock()  # threads that compile at once must not both be the first


def cubin(kernel: Kernel, architecture: str) -> bytes:
    """Machine code of a kernel, from the cache or compiled now; raises DependencyError where it cannot be compiled."""
    place = cache_dir("kernels") / f"{Path(kernel.file).stem}-{_key(kernel, architecture)}.cubin"
    with contextlib.suppress(OSError):
        return place.read_bytes()
    code, _ = compile_kernel(kernel, architecture)
    with contextlib.suppress(OSError):  # a cache that cannot be written only costs time
        place.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(dir=place.parent)
        with os.fdopen(descriptor, "wb") as file:
            file.write(code)
        Path(name).replace(place)  # whole or not at all, whoever else is writing it
    return code


def compile_kernel(kernel: Kernel, architecture: str) -> tuple[bytes, str]:
    """Machine code and the compiler's log: registers, shared memory and spills of each entry point."""
    nvrtc = load_nvrtc()
    known = {f"sm_{number}" for number in nvrtc.getSupportedArchs()}
    if architecture.rstrip("a") not in known:
        version = ".".join(map(str, nvrtc.getVersion()))
        raise DependencyError(
            f"{architecture}: this GPU is not known to NVRTC {version}; install a CuPy for a newer CUDA, "
            "or use --device cpu"
        )
    program = nvrtc.createProgram(_source(kernel), kernel.file, (), ())
    try:
        nvrtc.compileProgram(program, (*_OPTIONS, f"-arch={architecture}", *kernel.options))
        return nvrtc.getCUBIN(program), nvrtc.getProgramLog(program)
    except nvrtc.NVRTCError:
        log = nvrtc.getProgramLog(program)
        raise DependencyError(f"{kernel.file}: does not compile for {architecture}: {log}") from None
    finally:
        nvrtc.destroyProgram(program)


def load_nvrtc() -> Any:
    """CuPy's binding of NVRTC; raises DependencyError naming what to install."""
    try:
        from cupy.cuda import nvrtc

        with _OPENING:
            _open(nvrtc)
    except Exception as error:  # CuPy is missing, or it finds no NVRTC library: ImportError, RuntimeError or OSError
        raise DependencyError(f"CuPy: cannot compile kernels ({first_line(error)}); {advice()}") from None
    return nvrtc


@cache
def _open(nvrtc: Any) -> None:
    """Compile nothing, once: NVRTC opens a second library at its first compilation, which may be missing too."""
    program = nvrtc.createProgram("", "nothing.cu", (), ())
    try:
        nvrtc.compileProgram(program, ())
    finally:
        nvrtc.destroyProgram(program)


def advice() -> str:
    """The command that installs what kernels need, for the CUDA that torch was built for."""
    from torch.version import cuda

    return f"pip install 'quantize8[cuda{'12' if str(cuda).startswith('12') else '13'}]'"


def _source(kernel: Kernel) -> str:
    """A kernel's file with our own headers put in place, so that NVRTC needs no search path."""
    folder, seen = resource_dir("cuda"), set()

    def expand(name: str) -> str:
        lines = [f'#line 1 "{name}"']
        for number, line in enumerate((folder / name).read_text(encoding="utf-8").splitlines(), 1):
            header = line.removeprefix('#include "').removesuffix('"') if line.startswith('#include "') else None
            if header is None or not (folder / header).exists():
                lines.append(line if line != "#pragma once" else "")
            elif header not in seen:
                seen.add(header)
                lines += [expand(header), f'#line {number + 1} "{name}"']
        return "\n".join(lines)

    return expand(kernel.file) + "\n"


def _key(kernel: Kernel, architecture: str) -> str:
    """Changes with anything that the machine code depends on."""
    version = load_nvrtc().getVersion()
    parts = (_source(kernel), kernel.options, _OPTIONS, version, architecture)
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]
