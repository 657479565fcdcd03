"""What a conversion did, or one process's share of it, or with a dry run would do."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from quantize8.artifact.manifest import Manifest, Quantized, TensorRecord
from quantize8.artifact.plan import Plan
from quantize8.conversion.parts import Part


@dataclass
class Conversion:
    """The result of `convert` and of `finalize`."""

    out: Path
    plan: Plan
    seconds: float = 0.0
    manifest: Manifest | None = None  # None while there is no artifact: after a dry run, and after a part
    errors: dict[str, Quantized] = field(default_factory=dict)  # by weight
    dry_run: bool = False
    part: Part | None = None  # the share of the weight files that was written
    files: list[str] = field(default_factory=list)  # these
    kept: int = 0  # source tensors that an earlier run had finished
    kept_bytes: int = 0  # of them, as they are written
    to_calibrate: bool = False  # a dry run, which does not choose the outlier columns that converting would


def errors_of(records: Mapping[str, TensorRecord]) -> dict[str, Quantized]:
    """What quantizing did to each weight, by its name."""
    return {name: record.quantized for name, record in records.items() if record.quantized}
