"""The results of calibration, measured once and stored beside the unfinished artifact for all processes.

Outlier columns, searched scales and smoothing factors depend on the model's activations on a text. These are sums in
floating point, so two machines may differ in the last digit. Therefore the first process measures them, and all others
read its file.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from quantize8.artifact.manifest import digest
from quantize8.artifact.outliers import Calibrated
from quantize8.conversion.options import ConvertOptions
from quantize8.conversion.plan import Plan
from quantize8.errors import OutputError
from quantize8.files import flush
from quantize8.kernels import GPTQ
from quantize8.kernels.reference import Array
from quantize8.sources.base import Checkpoint
from quantize8.sources.smoothing import Factors, SmoothedCheckpoint


@dataclass(frozen=True)
class Calibration:
    """The results of calibration.

    Attributes:
        modules: Module -> its outlier columns and statistics of its inputs.
        factors: Tensor -> its smoothing factors; None without smoothing.
        features: Number of smoothed features of the hidden state.
        left: Number of groups of layers that could not be smoothed.
    """

    modules: dict[str, Calibrated]
    factors: Mapping[str, Factors] | None = None
    features: int = 0
    left: int = 0

    def smoothed(self, checkpoint: Checkpoint) -> Checkpoint:
        """The checkpoint with the smoothing factors applied while it is read; without factors, itself."""
        if self.factors is None:
            return checkpoint
        return SmoothedCheckpoint(checkpoint, self.factors, self.features, self.left)


def calibration_entry(options: ConvertOptions, text: str) -> dict[str, Any]:
    """Make the manifest's entry on calibration.

    Args:
        options: The options of the conversion.
        text: The calibration text.
    """
    from quantize8.calibration.calibrate import DEFAULT_TOKENS

    columns = "auto" if options.column_count is None else options.column_count
    asked: dict[str, Any] = {"outlier_columns": columns, "smooth": options.smooth}
    if options.rounding == GPTQ:
        from quantize8.calibration.rounding import ROUNDING_TOKENS

        asked["rounding_tokens"] = ROUNDING_TOKENS
    return {"text_blake3": digest(text.encode()), "tokens": DEFAULT_TOKENS, **asked}


def calibrated(plan: Plan, path: Path, decisions: dict[str, Any], start_over: bool = False) -> tuple[Plan, str]:
    """Apply the results of calibration to a plan, and measure them first if the file does not exist.

    If two processes measure at the same time, both continue with the file of the one that finishes first.

    Args:
        plan: A plan that is not calibrated.
        path: The file for the results.
        decisions: The decisions of the plan; a file with other decisions is refused.
        start_over: Replace such a file instead of refusing it.

    Returns:
        The calibrated plan and the digest of the file; the plan itself and "" if it needs no calibration.

    Raises:
        SourceError: The model cannot run, has no tokenizer, or computes NaN or infinity.
        OutputError: The file is of a conversion with other options, or not readable.
    """
    if not plan.calibration:
        return plan, ""
    if path.exists() and _metadata(path)["decisions"] != decisions:
        if not start_over:
            raise OutputError(f"{path}: is of other options or another source; start over with --overwrite")
        path.unlink()
    if not path.exists():
        if plan.text is None:
            raise OutputError(f"{path}: missing; run convert again")
        _save(_measure(plan, plan.text), path, decisions)
    return plan.with_calibration(_load(path)), digest(path.read_bytes())


def _measure(plan: Plan, text: str) -> Calibration:
    from quantize8.calibration.calibrate import calibrate
    from quantize8.calibration.smoothing import smooth

    alpha, count, chooses = plan.options.smooth, plan.options.column_count, plan.options.rounding == GPTQ
    if chooses and alpha is None and (count == 0 or "columns" not in plan.format.options):
        return Calibration({})  # the choice of codes measures what it needs
    weights = [*plan.quantized, *(f"{name}.weight" for name in plan.modules)]
    modules = {name.removesuffix(".weight") for name in weights}
    if alpha is None:
        return Calibration(_without_exact(calibrate(plan.checkpoint, text, count, modules=modules), chooses))
    smoothed = smooth(plan.checkpoint, calibrate(plan.checkpoint, text, 0), alpha)
    measured = _without_exact(calibrate(smoothed, text, count, modules=modules), chooses)
    return Calibration(measured, smoothed.factors, smoothed.features, smoothed.left)


def _without_exact(found: dict[str, Calibrated], chooses: bool) -> dict[str, Calibrated]:
    """What was found, if codes are chosen without exact columns: the codes of other columns balance their errors."""
    return {name: replace(each, exact=0) for name, each in found.items()} if chooses else found


def _save(found: Calibration, path: Path, decisions: dict[str, Any]) -> None:
    from safetensors.numpy import save

    tensors: dict[str, Array] = {}
    for name, module in found.modules.items():
        tensors |= {f"columns {name}": module.columns, f"mean_square {name}": module.mean_square}
        tensors |= {f"absmax {name}": module.absmax, f"exact {name}": np.array(module.exact)}
    for name, factors in (found.factors or {}).items():
        parts = {"rows": factors.rows, "factors": factors.columns}
        tensors |= {f"{kind} {name}": np.ascontiguousarray(part) for kind, part in parts.items() if part is not None}
    about = {"smoothed": found.factors is not None, "features": found.features, "left": found.left}
    data = save(tensors, {"decisions": json.dumps(decisions), "about": json.dumps(about)})
    descriptor, temporary = tempfile.mkstemp(dir=path.parent)
    with open(descriptor, "wb") as file:  # noqa: PTH123
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    try:
        os.link(temporary, path)  # unlike a rename, this does not replace the file of a faster process
    except FileExistsError:
        pass
    except OSError:  # the file system has no hard links
        Path(temporary).replace(path)
    Path(temporary).unlink(missing_ok=True)
    flush(path.parent)


def _metadata(path: Path) -> dict[str, Any]:
    """Read the metadata of a file written by `_save`."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            return {name: json.loads(text) for name, text in file.metadata().items()}
    except (SafetensorError, OSError, ValueError, AttributeError) as error:
        raise OutputError(f"{path}: not readable ({error}); remove its folder and run the command again") from None


def _load(path: Path) -> Calibration:
    from safetensors.numpy import load_file

    about, tensors = _metadata(path)["about"], load_file(path)
    by_kind: dict[str, dict[str, Array]] = {}
    for key, value in tensors.items():
        kind, _, name = key.partition(" ")
        by_kind.setdefault(kind, {})[name] = value
    modules = {
        name: Calibrated(columns, int(by_kind["exact"][name]), by_kind["mean_square"][name], by_kind["absmax"][name])
        for name, columns in by_kind.get("columns", {}).items()
    }
    rows, columns = by_kind.get("rows", {}), by_kind.get("factors", {})
    factors = {name: Factors(rows.get(name), columns.get(name)) for name in {**rows, **columns}}
    return Calibration(modules, factors if about["smoothed"] else None, about["features"], about["left"])
