"""Results for people (rich tables) and for programs (JSON). Nothing here prints."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from quantize8.conversion.result import Conversion
from quantize8.reports.artifacts import conversion, verification
from quantize8.reports.models import activations, comparison, demo, environment, evaluation, generation, weights
from quantize8.reports.tables import size

__all__ = [
    "activations", "as_json", "comparison", "conversion", "demo", "environment", "evaluation", "generation", "size",
    "verification", "weights",
]  # fmt: skip


def as_json(value: Any) -> Any:
    """Any result as plain JSON values; a conversion without the byte ranges of its plan."""
    if isinstance(value, Conversion):
        return value.as_json()
    if isinstance(value, Path):
        return str(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: as_json(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {str(key): as_json(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [as_json(entry) for entry in value]
    return value
