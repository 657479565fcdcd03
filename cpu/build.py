"""Compile the CPU kernels into quantize8/cpu: one library for each int8 unit of the target architecture.

`pip install` runs this as the build hook in pyproject.toml. In a clone, `python cpu/build.py` does the same. The
compiler is $CC, or cc, gcc or clang; if there is none, pip installs Zig from PyPI (`ziglang`) for the build.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

SOURCES = Path(__file__).resolve().parent
OUT = SOURCES.parent / "quantize8" / "cpu"
# No option changes a result: fused operations are written explicitly, and no code reads errno or FP exceptions.
_FLOATS = ["-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]
FLAGS = ["-std=gnu11", "-O3", "-shared", "-fvisibility=hidden", "-Wno-psabi", *_FLOATS]
_X86 = ("x86_64", "AMD64")
_ARM = ("aarch64", "arm64", "ARM64")
_AVX2 = ["-mavx2", "-mfma", "-mf16c", "-mbmi", "-mbmi2"]
_VNNI = [*_AVX2, *(f"-mavx512{part}" for part in ("f", "bw", "cd", "dq", "vl", "vnni"))]
# unit: its architectures, as platform.machine() names them (none: any), and the compiler flags
UNITS: dict[str, tuple[tuple[str, ...], list[str]]] = {
    "generic": ((), []),
    "avx2": (_X86, _AVX2),
    "avxvnni": (_X86, [*_AVX2, "-mavxvnni"]),
    "avx512vnni": (_X86, _VNNI),
    "amx": (_X86, [*_VNNI, "-mamx-tile", "-mamx-int8"]),
    "neon-dotprod": (_ARM, ["-march=armv8.2-a+dotprod"]),
    "neon-i8mm": (_ARM, ["-march=armv8.2-a+dotprod+i8mm"]),
}


def library_name(unit: str) -> str:
    """The file name of the library of a unit on this system."""
    return f"{unit}.{'dll' if sys.platform == 'win32' else 'so'}"


def units_of(machine: str) -> list[str]:
    """The units of an architecture, which is named as in platform.machine()."""
    return [unit for unit, (machines, _) in UNITS.items() if not machines or machine in machines]


def find_compiler() -> list[str] | None:
    """The command of a C compiler; None if there is none."""
    if named := os.environ.get("CC"):
        return shlex.split(named)
    for name in ("cc", "gcc", "clang"):
        if path := shutil.which(name):
            return [path]
    try:
        import ziglang  # noqa: F401
    except ImportError:
        return None
    return [sys.executable, "-m", "ziglang", "cc"]


def compile_unit(unit: str, out: Path, compiler: list[str]) -> None:
    """Compile the library of a unit; raises CalledProcessError with the output of the compiler."""
    sources = [SOURCES / name for name in ("weights.c", "ggml.c", "linear.c", "rounding.c", "threads.c")]
    if unit == "generic":
        sources.append(SOURCES / "detect.c")
    define = f"-DUNIT_{unit.upper().replace('-', '_')}"
    libraries = [] if sys.platform == "win32" else ["-fPIC", "-lm", "-lpthread"]
    target = UNITS[unit][1]
    if "ziglang" in compiler:  # Zig has its own names for the Arm architectures
        target = [flag.replace("-march=armv8.2-a", "-mcpu=generic+v8_2a") for flag in target]
    command = [*compiler, *FLAGS, define, *target, *map(str, sources), "-o", str(out), *libraries]
    subprocess.run(command, check=True, capture_output=True, text=True)


def digest(machine: str) -> str:
    """SHA-256 of everything that determines the libraries, except the compiler version."""
    files = [*sorted(SOURCES.glob("*.[ch]")), SOURCES / "build.py"]
    return hashlib.sha256(b"".join(path.read_bytes() for path in files) + machine.encode()).hexdigest()


def build(machine: str | None = None) -> list[Path]:
    """Compile the libraries that are not up to date.

    Args:
        machine: Architecture, as platform.machine() names it. None is that of this machine.

    Returns:
        The paths of all libraries.

    Raises:
        SystemExit: There is no compiler, or it failed.
    """
    machine = machine or platform.machine()
    made = [OUT / library_name(unit) for unit in units_of(machine)]
    stamp, wanted = OUT / "digest", digest(machine)
    if stamp.is_file() and stamp.read_text() == wanted and all(path.is_file() for path in made):
        return made
    compiler = find_compiler()
    if compiler is None:
        sys.exit("cpu/build.py: no C compiler found; install gcc or clang, or `pip install ziglang`, or set CC")
    OUT.mkdir(exist_ok=True)
    stamp.unlink(missing_ok=True)
    try:
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(lambda path: compile_unit(path.stem, path, compiler), made))
    except subprocess.CalledProcessError as error:
        sys.exit(
            f"cpu/build.py: {shlex.join(error.cmd)} failed; it needs gcc 11, clang 12 or Zig: `pip install ziglang`, "
            f"and CC='{sys.executable} -m ziglang cc'. Output of the compiler:\n{error.stderr}"
        )
    stamp.write_text(wanted)
    return made


try:
    from hatchling.builders.hooks.plugin.interface import BuildHookInterface
except ImportError:  # run as a script
    pass
else:

    class CpuKernels(BuildHookInterface):  # type: ignore[type-arg]
        """The build hook that hatchling runs before it packs a wheel or makes an editable install."""

        def dependencies(self) -> list[str]:
            """The Zig compiler, if the system has no C compiler."""
            return [] if find_compiler() else ["ziglang>=0.13"]

        def initialize(self, version: str, build_data: dict[str, object]) -> None:
            """Compile, and tag the wheel with the platform."""
            if self.target_name == "wheel":
                build()
                build_data.update(
                    pure_python=False,
                    tag=f"py3-none-{_platform_tag()}",
                    artifacts=[f"quantize8/cpu/{library_name('*')}"],
                )


def _platform_tag() -> str:
    import sysconfig

    tag = sysconfig.get_platform()
    if tag.endswith("-universal2"):  # a universal Python for macOS; the libraries are for one architecture
        tag = "macosx-11.0-arm64" if platform.machine() == "arm64" else tag.replace("universal2", "x86_64")
    return tag.replace("-", "_").replace(".", "_")


if __name__ == "__main__":
    print(*build(), sep="\n")
