"""What a conversion did, or one process's share of it, or with a dry run would do."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantize8.artifact.manifest import Manifest, Quantized, TensorRecord
from quantize8.conversion.parts import Part
from quantize8.conversion.plan import Plan

if TYPE_CHECKING:
    from quantize8.conversion.forecast import Forecast
    from quantize8.runtime.check import Check


@dataclass
class Conversion:
    """The result of `convert` and of `finalize`."""

    out: Path | str  # an address without secrets
    plan: Plan
    seconds: float = 0.0
    manifest: Manifest | None = None  # None while there is no artifact: after a dry run, and after a part
    records: Mapping[str, TensorRecord] = field(default_factory=dict)  # of the tensors that were written
    dry_run: bool = False
    part: Part | None = None  # the share of the weight files that was written
    files: list[str] = field(default_factory=list)  # these
    resumed: int = 0  # source tensors that an earlier run had finished
    resumed_bytes: int = 0  # of them, as they are written
    pushed: str | None = None  # the address of the commit on the hub, if it was uploaded
    forecast: Forecast | None = None  # of a dry run
    check: Check | None = None  # of a whole artifact, where it was checked
    to_calibrate: bool = False  # a dry run, which does not choose the outlier columns that converting would

    @property
    def errors(self) -> dict[str, Quantized]:
        """What quantizing did to each weight, by name."""
        return {name: record.quantized for name, record in self.records.items() if record.quantized}

    def as_json(self) -> dict[str, Any]:
        """Plain JSON values, without the plan of every byte."""
        plan = self.plan
        errors = {name: entry.relative_error for name, entry in self.errors.items()}
        worst = max(errors, key=lambda name: errors[name], default="")
        return {
            "out": str(self.out),
            "dry_run": self.dry_run,
            "part": None if self.part is None else {"part": str(self.part), "files": self.files},
            "resumed": {"tensors": self.resumed, "bytes": self.resumed_bytes},
            "source": plan.checkpoint.identity,
            "format": plan.format.title,
            "recipe": plan.recipe.as_json(),
            "scale": "mse" if plan.searches else "absmax",
            "source_bytes": plan.source_bytes,
            "output_bytes": plan.output_bytes,
            "bits_per_weight": round(8 * plan.output_bytes / max(1, plan.weights), 2),
            "files": {shard.file: shard.nbytes for shard in plan.shards},
            "int8_modules": sorted(plan.modules),
            "kept": plan.kept,
            "guessed": plan.guessed,
            "left_out": plan.left_out,
            "mean_relative_error": sum(errors.values()) / len(errors) if errors else None,
            "worst": f"{errors[worst]:.4f} in {worst}" if errors else None,
            "check": None if self.check is None else asdict(self.check),
            "pushed": self.pushed,
            "seconds": round(self.seconds, 3),
            "forecast": None if self.forecast is None else asdict(self.forecast),
        }
