"""Versions, devices, and missing packages with the commands that install them."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from dataclasses import dataclass, field

import psutil

from quantize8 import __version__, optional
from quantize8.kernels import cpu, nvrtc
from quantize8.kernels import devices as choice

_PACKAGES = ("torch", "transformers", "numpy", "safetensors", "huggingface_hub", "gguf", "accelerate")
_RUN = "needed to run models, and to convert .bin files, from or to GGUF, and most architectures"
_OPTIONAL = {
    "bitsandbytes": ("open artifacts without quantize8", "pip install bitsandbytes"),
    "matplotlib": ("write pages with --report", "pip install 'quantize8[report]'"),
}
_CUPY_PACKAGES = ("cupy-cuda13x", "cupy-cuda12x", "cupy")


@dataclass(frozen=True)
class Environment:
    """Package versions and devices of this machine, and advice on what is missing."""

    python: str
    system: str
    cpu: str
    processors: int
    memory_bytes: int
    gpus: list[str]
    kernels: str  # whether the CUDA kernels give correct results here, or why they cannot be used
    versions: dict[str, str | None] = field(default_factory=dict)  # by package; None: not installed
    advice: dict[str, str] = field(default_factory=dict)  # what is missing -> the command that installs it


def environment() -> Environment:
    """Inspect packages and devices. Reads no credentials, and no environment variable other than QUANTIZE8_UNIT."""
    versions: dict[str, str | None] = {"quantize8": __version__}
    versions |= {name: _version(name) for name in (*_PACKAGES, *_OPTIONAL)}
    versions["cupy"] = next((found for name in _CUPY_PACKAGES if (found := _version(name))), None)
    advice = {
        f"{name}: not installed, needed to {purpose}": command
        for name, (purpose, command) in _OPTIONAL.items()
        if versions[name] is None
    }
    faults = {name: reason for name in optional.RUN if (reason := optional.fault(name, versions[name]))}
    if faults:
        advice[f"{'; '.join(f'{name}: {reason}' for name, reason in faults.items())}, {_RUN}"] = optional.COMMAND
    required = [name for name in _PACKAGES if name not in optional.RUN]
    advice |= {f"{name}: not installed": f"pip install {name}" for name in required if versions[name] is None}
    if versions["cupy"] is None and versions["torch"]:
        advice["cupy: not installed, needed to compute on a GPU"] = nvrtc.advice()
    cpu, gpus = _devices(bool(versions["torch"]))
    return Environment(
        python=platform.python_version(),
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        cpu=cpu,
        processors=os.cpu_count() or 1,
        memory_bytes=psutil.virtual_memory().total,
        gpus=gpus,
        kernels=_kernels() if versions["torch"] else "torch is not installed",
        versions=versions,
        advice=advice,
    )


def _version(package: str) -> str | None:
    if package in optional.RUN:
        return optional.installed(package)
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _kernels() -> str:
    reason = choice.problem()
    return "correct results on GPU 0" if reason is None else reason.removeprefix("device cuda: ")


def _devices(with_torch: bool) -> tuple[str, list[str]]:
    """The CPU's int8 unit, its vector extensions as torch uses them, and the GPUs that torch sees."""
    forced = f", by {cpu.VARIABLE}" if os.environ.get(cpu.VARIABLE) else ""
    processor = f"int8 by {cpu.MEANING[cpu.chosen()]}{forced}"
    if not with_torch:
        return processor, []
    import torch

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return f"{processor}; torch uses {torch.backends.cpu.get_cpu_capability()}", gpus
