"""Compilation of the CUDA sources with NVRTC, and a cache of the machine code.

CuPy's `RawModule` compiles for the installed GPU only and cannot request Hopper's special instructions (sm_90a), so
NVRTC is called directly. That works without a GPU too: a test compiles every kernel for every architecture.
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
from quantize8.files import cache_dir, resource_dir
from quantize8.kernels.cuda import Kernel

_OPTIONS = ("-std=c++17", "-default-device", "--ptxas-options=-v", "--ptxas-options=-warn-spills")
_OPENING = threading.Lock()  # only one thread may do the first compilation


def cubin(kernel: Kernel, architecture: str) -> bytes:
    """The machine code of a kernel, from the cache or compiled now.

    Args:
        kernel: The kernel.
        architecture: What to compile for, such as "sm_80".

    Raises:
        DependencyError: NVRTC is missing, does not know the architecture, or cannot compile the kernel.
    """
    path = cache_dir("kernels") / f"{Path(kernel.file).stem}-{_key(kernel, architecture)}.cubin"
    with contextlib.suppress(OSError):
        return path.read_bytes()
    code, _ = compile_kernel(kernel, architecture)
    with contextlib.suppress(OSError):  # a cache that cannot be written only costs time
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(dir=path.parent)
        with os.fdopen(descriptor, "wb") as file:
            file.write(code)
        Path(name).replace(path)  # atomic, as other processes may write the same file
    return code


def compile_kernel(kernel: Kernel, architecture: str) -> tuple[bytes, str]:
    """Compile a kernel.

    Args:
        kernel: The kernel.
        architecture: What to compile for, such as "sm_80".

    Returns:
        The machine code, and the compiler's log with registers, shared memory and spills of each entry point.

    Raises:
        DependencyError: NVRTC is missing, does not know the architecture, or cannot compile the kernel.
    """
    nvrtc = load_nvrtc()
    known = {f"sm_{number}" for number in nvrtc.getSupportedArchs()}
    if architecture.rstrip("a") not in known:
        version = ".".join(map(str, nvrtc.getVersion()))
        raise DependencyError(
            f"{architecture}: NVRTC {version} does not know this GPU; install CuPy for a newer CUDA, or use "
            "--device cpu"
        )
    program = nvrtc.createProgram(_source(kernel), kernel.file, (), ())
    try:
        nvrtc.compileProgram(program, (*_OPTIONS, f"-arch={architecture}", *kernel.options))
        return nvrtc.getCUBIN(program), nvrtc.getProgramLog(program)
    except nvrtc.NVRTCError:
        log = nvrtc.getProgramLog(program)
        raise DependencyError(
            f"{kernel.file}: does not compile for {architecture}; use --device cpu, and report this: {log}"
        ) from None
    finally:
        nvrtc.destroyProgram(program)


def load_nvrtc() -> Any:
    """CuPy's binding of NVRTC; if it does not work, raises DependencyError that names what to install."""
    try:
        from cupy.cuda import nvrtc

        with _OPENING:
            _open(nvrtc)
    except Exception as error:  # CuPy is missing, or does not find NVRTC: ImportError, RuntimeError or OSError
        raise DependencyError(f"CuPy: cannot compile kernels ({first_line(error)}); {advice()}") from None
    return nvrtc


@cache
def _open(nvrtc: Any) -> None:
    """Compile an empty source once: at its first compilation NVRTC opens a second library, which may be missing too."""
    program = nvrtc.createProgram("", "nothing.cu", (), ())
    try:
        nvrtc.compileProgram(program, ())
    finally:
        nvrtc.destroyProgram(program)


def advice() -> str:
    """The command that installs what the kernels need, for the CUDA version that torch was built for."""
    from torch.version import cuda

    return f"pip install 'quantize8[cuda{'12' if str(cuda).startswith('12') else '13'}]'"


def _source(kernel: Kernel) -> str:
    """A kernel's source with the project's own headers expanded, so that NVRTC needs no search path."""
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
    """A digest of everything that the machine code depends on."""
    version = load_nvrtc().getVersion()
    parts = (_source(kernel), kernel.options, _OPTIONS, version, architecture)
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]
