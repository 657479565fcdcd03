"""quantize8: an int8 quantizer and converter for LLM checkpoints, based on LLM.int8()."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
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
    from quantize8.model.linear import Int8Linear
    from quantize8.model.loading import load
    from quantize8.model.quantizer import Int8Config, enable
    from quantize8.model.training import merge_and_unload
    from quantize8.operations.convert import convert
    from quantize8.operations.evaluate import evaluate
    from quantize8.operations.inspect import inspect
    from quantize8.operations.plan import plan
    from quantize8.operations.push import push
    from quantize8.operations.run import run
    from quantize8.operations.verify import verify

__version__ = "0.1.0"

__all__ = [
    "ArtifactError",
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
    "Int8Config": "model.quantizer",
    "Int8Linear": "model.linear",
    "convert": "operations.convert",
    "enable": "model.quantizer",
    "evaluate": "operations.evaluate",
    "inspect": "operations.inspect",
    "load": "model.loading",
    "merge_and_unload": "model.training",
    "plan": "operations.plan",
    "push": "operations.push",
    "run": "operations.run",
    "verify": "operations.verify",
}


def __getattr__(name: str) -> Any:
    """Import a public name on first use, so that `import quantize8` does not import torch."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = _HOMES.get(name, "errors")
    if home.startswith("model."):
        from quantize8.optional import require

        require(f"for quantize8.{name}")
    value = getattr(importlib.import_module(f"{__name__}.{home}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
