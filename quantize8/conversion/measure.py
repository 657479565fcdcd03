"""What a text decides of a conversion: measured once, kept in the staging folder, and the same for every process."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from quantize8.artifact.format import Int8Format
from quantize8.artifact.manifest import digest
from quantize8.artifact.outliers import Calibrated
from quantize8.checkpoint.smoothing import Factors, SmoothedCheckpoint
from quantize8.conversion.request import Job
from quantize8.errors import OutputError
from quantize8.files import flush
from quantize8.ops.reference import Array
from quantize8.ops.scales import MSE


@dataclass(frozen=True)
class Measured:
    """What calibration says of each weight, and by what the checkpoint was smoothed before."""

    calibrated: dict[str, Calibrated]  # by module
    factors: Mapping[str, Factors] | None = None  # by tensor; None where nothing is smoothed
    features: int = 0
    left: int = 0


def measure(job: Job, path: Path, decisions: dict[str, Any], start_over: bool = False) -> str:
    """Bring into the job's plan what its text decides, from the file at `path` if it is there; returns its digest.

    With `start_over` a file of other decisions is replaced. Two processes may measure at the same time: the file of
    the first is what both go on with.
    Raises SourceError where the model cannot run, has no tokenizer, or computes NaN or infinity.
    """
    if not job.calibration:
        return ""
    if path.exists() and _about(path)["decisions"] != decisions:
        if not start_over:
            raise OutputError(f"{path}: is of other options or another source; start over with --overwrite")
        path.unlink()
    if not path.exists():
        if job.text is None:
            raise OutputError(f"{path}: missing; run convert again")
        _save(_measured(job), path, decisions)
    found = _load(path)
    plan = job.plan
    if found.factors is not None:
        plan.checkpoint = SmoothedCheckpoint(plan.checkpoint, found.factors, found.features, found.left)
    if isinstance(plan.format, Int8Format):
        plan.keep_outliers(found.calibrated)
    if job.request.scale == MSE:
        known = {f"{name}.weight": each.search for name, each in found.calibrated.items()}
        plan.searches |= {name: search for name, search in known.items() if name in plan.searches}
    return digest(path.read_bytes())


def _measured(job: Job) -> Measured:
    from quantize8.model.calibration import calibrate
    from quantize8.model.smoothing import smooth

    plan, alpha, text = job.plan, job.request.smooth, job.text
    assert text is not None
    weights = [*plan.quantized, *(f"{name}.weight" for name in plan.modules)]
    modules = {name.removesuffix(".weight") for name in weights}
    if alpha is None:
        return Measured(calibrate(plan.checkpoint, text, job.request.columns, modules=modules))
    smoothed = smooth(plan.checkpoint, calibrate(plan.checkpoint, text, 0), alpha)
    found = calibrate(smoothed, text, job.request.columns, modules=modules)
    return Measured(found, smoothed.factors, smoothed.features, smoothed.left)


def _save(found: Measured, path: Path, decisions: dict[str, Any]) -> None:
    from safetensors.numpy import save

    tensors: dict[str, Array] = {}
    for name, each in found.calibrated.items():
        tensors |= {f"columns {name}": each.columns, f"mean_square {name}": each.mean_square}
        tensors |= {f"absmax {name}": each.absmax, f"exact {name}": np.array(each.exact)}
    for name, factors in (found.factors or {}).items():
        parts = {"rows": factors.rows, "factors": factors.columns}
        tensors |= {f"{kind} {name}": np.ascontiguousarray(part) for kind, part in parts.items() if part is not None}
    about = {"smoothed": found.factors is not None, "features": found.features, "left": found.left}
    data = save(tensors, {"decisions": json.dumps(decisions), "about": json.dumps(about)})
    descriptor, name = tempfile.mkstemp(dir=path.parent)
    with open(descriptor, "wb") as file:  # noqa: PTH123
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    try:
        os.link(name, path)  # unlike a rename, leaves the file of a faster process in place
    except FileExistsError:
        pass
    except OSError:  # no links on this file system
        Path(name).replace(path)
    Path(name).unlink(missing_ok=True)
    flush(path.parent)


def _about(path: Path) -> dict[str, Any]:
    """What a file that `_save` wrote says of itself."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            return {name: json.loads(text) for name, text in file.metadata().items()}
    except (SafetensorError, OSError, ValueError, AttributeError) as error:
        raise OutputError(f"{path}: not readable ({error}); remove its folder and run the command again") from None


def _load(path: Path) -> Measured:
    from safetensors.numpy import load_file

    about, tensors = _about(path)["about"], load_file(path)
    by_kind: dict[str, dict[str, Array]] = {}
    for key, value in tensors.items():
        kind, _, name = key.partition(" ")
        by_kind.setdefault(kind, {})[name] = value
    calibrated = {
        name: Calibrated(columns, int(by_kind["exact"][name]), by_kind["mean_square"][name], by_kind["absmax"][name])
        for name, columns in by_kind.get("columns", {}).items()
    }
    rows, columns = by_kind.get("rows", {}), by_kind.get("factors", {})
    factors = {name: Factors(rows.get(name), columns.get(name)) for name in {**rows, **columns}}
    return Measured(calibrated, factors if about["smoothed"] else None, about["features"], about["left"])
