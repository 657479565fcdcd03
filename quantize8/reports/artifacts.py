"""Terminal tables with the results of convert, plan, finalize and verify."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.text import Text

from quantize8.commands.verify import Verification
from quantize8.conversion.forecast import Forecast
from quantize8.conversion.result import Conversion
from quantize8.files import TEXT
from quantize8.formats.base import Int8Format
from quantize8.kernels import GPTQ
from quantize8.reports.tables import duration, size, table

if TYPE_CHECKING:
    from quantize8.conversion.plan import Plan
    from quantize8.conversion.rounding import RoundedWeights
    from quantize8.runtime.check import Check
    from quantize8.sources import Checkpoint


def conversion(result: Conversion) -> RenderableType:
    """Make the table of a conversion, a dry run or a plan."""
    plan, numbers = result.plan, result.as_json()
    rows = table(("", "left"), ("", "left"))
    rows.add_row(*_artifact(result))
    if adapter := _adapter(plan.checkpoint):
        rows.add_row("adapter", adapter)
    rows.add_row("format", plan.format.title + (", scales with the least squared error" if plan.searches else ""))
    if isinstance(plan.format, Int8Format):
        rows.add_row("recipe", f"{plan.recipe.name}, threshold {plan.recipe.threshold:g}")
    rows.add_row("size", f"{size(plan.source_bytes)} -> {size(plan.output_bytes)} in {len(plan.shards)} file(s)")
    share, density = plan.int8_weights / max(1, plan.weights), f"{numbers['bits_per_weight']} bits per weight"
    layers = f"{len(plan.modules)} layers, {share:.1%} of the weights; {density}"
    rows.add_row(*(("int8", layers) if plan.modules else ("weights", density)))
    if plan.rotations:
        sizes = " or ".join(map(str, sorted({*plan.rotations.values()}, reverse=True)))
        rows.add_row("rotated", f"the inputs of {len(plan.rotations)} layers, in blocks of {sizes}")
    if plan.rounded is not None:
        rows.add_row("rounding", _rounding(plan, plan.rounded))
    if plan.smoothed:
        rows.add_row("smoothed", plan.smoothed)
    if result.to_calibrate:
        rows.add_row("calibration", "is made from the text when the conversion runs, not in this plan")
    if plan.outliers is not None:
        wide = sum(len(found.columns) for found in plan.calibrated.values())
        exact = sum(found.exact for found in plan.calibrated.values())
        rows.add_row("outliers", f"{wide} columns, {exact} of them stored exactly: {size(plan.outliers.nbytes)}")
    if plan.guessed:
        rows.add_row("guessed", f"which layers are Linear, from their names: {plan.guessed}")
    for title, found in (("left in float", plan.kept), ("not loaded", plan.unloaded), ("left out", plan.left_out)):
        for reason, names in sorted(_by_reason(found).items()):
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            nbytes = sum(tensor.nbytes for name in names for tensor in plan.outputs_of(name))
            rows.add_row(title, f"{names[0]}{more}: {reason}{f' ({size(nbytes)})' if nbytes else ''}")
    for loader, reason in plan.closed_to.items():
        rows.add_row("not for", f"{loader}: {reason}")
    if plan.carries:
        rows.add_row("codes", "copied from the source")
    elif result.errors:
        rows.add_row("relative error", f"{numbers['mean_relative_error']:.4f} mean, {numbers['worst']}")
    if numbers["exact"] is not None:
        rows.add_row("exact", f"{_percent(numbers['exact'])} of the weights that were 4-bit floats")
    if result.resumed:
        resumed = f"{result.resumed} tensors ({size(result.resumed_bytes)})"
        rows.add_row("resumed", f"{resumed} were already written and are valid")
    if result.check is not None:
        rows.add_row("check", _check(result.check))
    if result.forecast is not None:
        return Group(rows, Text(), *_forecast(result.forecast, result.to_calibrate))
    rows.add_row("time", f"{result.seconds:.1f} s")
    return rows


def verification(result: Verification) -> RenderableType:
    """Make the line that summarizes a verification."""
    return Text(f"{result.artifact}: {result.tensors} tensors, {result.files} files, {size(result.nbytes)}: all good")


def _rounding(plan: Plan, rounded: RoundedWeights) -> str:
    """How many codes calibration chose, with which text if the user named none, and which weights it left out."""
    chosen = sum(rounded.rounding_of(name) == GPTQ for name in plan.quantized)
    text = ", by the text in this package" if plan.options.calibrate == str(TEXT) else ""
    counts = f"{GPTQ}: {chosen} of {len(plan.quantized)} weights{text}"
    if not rounded.nearest:
        return counts
    more = f" and {len(rounded.nearest) - 1} more" if len(rounded.nearest) > 1 else ""
    return f"{counts}; {min(rounded.nearest)}{more} to nearest, as the text hardly reaches them"


def _percent(share: float) -> str:
    """A share rounded down, so that only all of it is 100%."""
    return "100%" if share == 1 else f"{math.floor(share * 1000) / 10:.1f}%"


def _check(found: Check) -> str:
    parts = [f"{found.parameters} parameters equal the source's"] if found.parameters else []
    if found.error is not None:
        outputs = f"{found.tokens} tokens: outputs differ by {found.error:.1%}"
        if found.kl is not None and found.top1 is not None:
            outputs += f", KL {found.kl:.4f} nats, top-1 agreement {found.top1:.0%}"
        parts.append(outputs)
    if found.overflow is not None:
        parts.append(f"{found.overflow} overflows in float16, the model's dtype: load it in bfloat16 or float32")
    if found.skipped is not None:
        parts.append(f"not checked: {found.skipped}")
    if found.seconds:
        parts.append(f"{found.seconds:.1f} s")
    return "; ".join(parts)


def _artifact(result: Conversion) -> tuple[str, str]:
    """The title and text of the first row: the artifact, or the weight files of a part."""
    if result.part is None:
        where = f"{result.out} {result.pushed or ''}".rstrip()
        return "would write" if result.dry_run else "artifact", where
    if not result.files:
        count = len(result.plan.shards)
        return f"part {result.part}", f"nothing to do: {result.out} has {count} weight file{'s' * (count > 1)}"
    files = ", ".join(result.files)
    if result.dry_run:
        return f"part {result.part}", f"would write {files}"
    return f"part {result.part}", f"wrote {files}; when all parts are written, run quantize8 finalize {result.out}"


def _adapter(source: Checkpoint) -> str:
    """What is merged into the source; empty if nothing is."""
    name, key = source.identity.get("adapter"), "tie_word_embeddings"
    if name is None:
        return ""
    apart = "; the embedding and the output head, which it tied, become a weight each"
    untied = source.config.get(key) != source.origin.config.get(key)
    return f"{name}, merged into {source.identity['id']}{apart if untied else ''}"


def _forecast(found: Forecast, to_calibrate: bool) -> list[RenderableType]:
    columns = ("machines", "files per machine", "written per machine", "time")
    shares = table(*((column, "right") for column in columns))
    for share in found.shares:
        counts = (f"{share.machines:,}", f"{share.files:,}")
        shares.add_row(*counts, size(share.written_bytes), duration(share.seconds))
    needs = table(("", "left"), ("", "left"))
    needs.add_row("memory", f"{size(found.memory)} with {found.threads} thread(s)")
    more = f", and {size(found.download)} for the download, none with --stream" if found.download else ""
    needs.add_row("disk", f"{size(found.disk)}{more}; {size(found.free)} are free")
    for kind, rate in sorted(found.rates.items()):
        needs.add_row("measured", f"{kind}: {size(rate)}/s")
    needs.add_row("", f"disk: {size(found.disk_rate)}/s")
    if found.rounding is not None:
        cost = found.rounding
        most = f"up to {duration(cost.seconds)}, {size(cost.memory)} of memory and {size(cost.disk)} of disk"
        needs.add_row("codes first", most)
    elif to_calibrate:
        needs.add_row("not included", "the time and memory of --calibrate")
    return [shares, Text(), needs]


def _by_reason(kept: dict[str, str]) -> dict[str, list[str]]:
    reasons: dict[str, list[str]] = {}
    for name, reason in kept.items():
        reasons.setdefault(reason, []).append(name)
    return reasons
