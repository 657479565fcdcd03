"""The result of a conversion: of all of it, of one process's share, or of a dry run."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantize8.artifact.manifest import Manifest, Quantized, TensorRecord
from quantize8.conversion.parts import Part
from quantize8.conversion.plan import Plan
from quantize8.sources.base import FLOAT4

if TYPE_CHECKING:
    from quantize8.conversion.forecast import Forecast
    from quantize8.runtime.check import Check


@dataclass
class Conversion:
    """The result of `convert`, `plan` and `finalize`.

    Attributes:
        out: Where the artifact is; an address is given without its secrets.
        plan: What the conversion does.
        seconds: How long it took.
        manifest: The manifest; None if there is no artifact yet: after a dry run, or after a part.
        records: Name of each tensor that was written -> its record in the manifest.
        dry_run: Whether nothing was written.
        part: The share of the weight files that was written; None for all of them.
        files: The weight files of that share.
        resumed: Number of source tensors that an earlier run had finished.
        resumed_bytes: Size of what those tensors were written as, in bytes.
        pushed: Address of the commit on the hub, if the artifact was uploaded.
        forecast: What a dry run predicts.
        check: Comparison of the complete artifact with its source, if it was done.
        to_calibrate: Whether a dry run left out the choice of outlier columns, which the conversion would make.
    """

    out: Path | str
    plan: Plan
    seconds: float = 0.0
    manifest: Manifest | None = None
    records: Mapping[str, TensorRecord] = field(default_factory=dict)
    dry_run: bool = False
    part: Part | None = None
    files: list[str] = field(default_factory=list)
    resumed: int = 0
    resumed_bytes: int = 0
    pushed: str | None = None
    forecast: Forecast | None = None
    check: Check | None = None
    to_calibrate: bool = False

    @property
    def errors(self) -> dict[str, Quantized]:
        """Quantized weight -> its quantization error and related values."""
        return {name: record.quantized for name, record in self.records.items() if record.quantized}

    @property
    def exact(self) -> float | None:
        """The share of the weights from 4-bit floats whose tensors lost nothing; None if there are no such weights."""
        sizes = {True: 0, False: 0}
        for name, outputs in self.plan.outputs.items():
            info, found = self.plan.checkpoint.tensors.get(name), self.errors.get(outputs[0].name)
            if info is not None and found is not None and info.stored_dtype in FLOAT4:
                sizes[found.relative_error == 0] += math.prod(info.shape)
        total = sum(sizes.values())
        return sizes[True] / total if total else None

    def as_json(self) -> dict[str, Any]:
        """The result as JSON values, without the layout of every tensor."""
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
            "rounding": plan.options.rounding,
            "rotated": dict(sorted(plan.rotations.items())),
            "source_bytes": plan.source_bytes,
            "output_bytes": plan.output_bytes,
            "bits_per_weight": round(8 * plan.output_bytes / max(1, plan.weights), 2),
            "files": {shard.file: shard.nbytes for shard in plan.shards},
            "int8_modules": sorted(plan.modules),
            "kept": plan.kept,
            "unloaded": plan.unloaded,
            "closed_to": plan.closed_to,
            "guessed": plan.guessed,
            "left_out": plan.left_out,
            "mean_relative_error": sum(errors.values()) / len(errors) if errors else None,
            "exact": self.exact,
            "worst": f"{errors[worst]:.4f} in {worst}" if errors else None,
            "check": None if self.check is None else asdict(self.check),
            "pushed": self.pushed,
            "seconds": round(self.seconds, 3),
            "forecast": None if self.forecast is None else asdict(self.forecast),
        }
