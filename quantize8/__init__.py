"""quantize8: an int8 quantizer and converter for LLM checkpoints, based on LLM.int8()."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from quantize8.commands.convert import convert
    from quantize8.commands.evaluate import evaluate
    from quantize8.commands.inspect import inspect
    from quantize8.commands.plan import plan
    from quantize8.commands.push import push
    from quantize8.commands.run import run
    from quantize8.commands.verify import verify
    from quantize8.conversion.options import ConvertOptions
    from quantize8.errors import (
        ArtifactError,
        DependencyError,
        DeviceWarning,
        OutputError,
        Quantize8Error,
        RecipeError,
        SourceError,
        WeightError,
    )
    from quantize8.runtime.linear import Int8Linear
    from quantize8.runtime.loading import load
    from quantize8.runtime.quantizer import Int8Config, enable
    from quantize8.runtime.training import merge_and_unload

__version__ = "0.1.0"

__all__ = [
    "ArtifactError",
    "ConvertOptions",
    "DependencyError",
    "DeviceWarning",
    "Int8Config",
    "Int8Linear",
    "OutputError",
    "Quantize8Error",
    "RecipeError",
    "SourceError",
    "WeightError",
    "convert",
    "enable",
    "evaluate",
    "inspect",
    "load",
    "merge_and_unload",
    "plan",
    "push",
    "run",
    "verify",
]

_HOMES = {
    "ConvertOptions": "conversion.options",
    "Int8Config": "runtime.quantizer",
    "Int8Linear": "runtime.linear",
    "convert": "commands.convert",
    "enable": "runtime.quantizer",
    "evaluate": "commands.evaluate",
    "inspect": "commands.inspect",
    "load": "runtime.loading",
    "merge_and_unload": "runtime.training",
    "plan": "commands.plan",
    "push": "commands.push",
    "run": "commands.run",
    "verify": "commands.verify",
}


def __getattr__(name: str) -> Any:
    """Import a public name on first use, so that `import quantize8` does not import torch."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = _HOMES.get(name, "errors")
    if home.startswith("runtime."):
        from quantize8.optional import require

        require(f"for quantize8.{name}")
    value = getattr(importlib.import_module(f"{__name__}.{home}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
