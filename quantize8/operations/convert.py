"""Checkpoint to int8 artifact, streaming: memory holds a few blocks of rows, never a weight file or the model.

Everything that can be known from headers alone is settled first (names, shapes, places in the output, disk space).
Then each tensor is read, quantized, hashed and written block by block, by several threads in any order: every byte
has its place beforehand, so the result does not depend on who wrote it when.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from threading import Event
from typing import Any, get_args

from quantize8 import __version__
from quantize8.artifact.folder import check_disk, check_output, staged, write_file
from quantize8.artifact.format import Format, Int8Format
from quantize8.artifact.formats import DEFAULT_FORMAT, make_format
from quantize8.artifact.gguf import NAME as GGUF
from quantize8.artifact.lanes import Lane, lanes, write_lane
from quantize8.artifact.layout import DEFAULT_SHARD_SIZE, index
from quantize8.artifact.manifest import MANIFEST_NAME, Manifest, Quantized, TensorRecord, digest
from quantize8.artifact.outliers import Calibrated
from quantize8.artifact.plan import Plan, make_plan
from quantize8.artifact.upload import prepare, upload
from quantize8.artifact.writer import CpuQuantizer, Progress, WeightQuantizer, Writer
from quantize8.checkpoint import is_url, open_checkpoint
from quantize8.checkpoint.base import CONFIG_NAME
from quantize8.errors import OutputError
from quantize8.ops.choice import resolve
from quantize8.ops.scales import ABSMAX, MSE, Scale, ScaleSearch
from quantize8.recipe import DEFAULT_RECIPE, load_recipe

_MAX_WORKERS = 8  # beyond this many threads the disk is the limit


@dataclass
class Conversion:
    """What `convert` did, or with dry_run would do."""

    out: Path
    plan: Plan
    seconds: float = 0.0
    manifest: Manifest | None = None  # None after a dry run
    errors: dict[str, Quantized] = field(default_factory=dict)  # by weight
    pushed: str | None = None  # address of the commit on the hub


def convert(
    source: str,
    out: str | Path | None = None,
    *,
    format: str = DEFAULT_FORMAT,
    scheme: str | None = None,
    moe: str | None = None,
    threshold: float | None = None,
    calibrate: str | Path | None = None,
    outlier_columns: int | str = "auto",
    smooth: float | None = None,
    recipe: str = DEFAULT_RECIPE,
    scale: str = ABSMAX,
    device: str = "auto",
    max_shard_size: str = DEFAULT_SHARD_SIZE,
    workers: int | None = None,
    dry_run: bool = False,
    overwrite: bool = False,
    stream: bool = False,
    push_to_hub: str | None = None,
    private: bool = False,
    revision: str | None = None,
    token: str | None = None,
    progress: Progress | None = None,
) -> Conversion:
    """Write an artifact of a checkpoint: int8, or with a floating-point format the plain numbers of a quantized one.

    Args: source, a hub id, folder or file; out, the new folder (default: the source's name with what was made of it,
    such as `<name>-int8`, in the current one); format, bitsandbytes, compressed-tensors, gguf, float16, bfloat16 or
    float32; scheme (w8a8 or w8a16) and moe (vllm or transformers), of compressed-tensors alone; threshold, of
    bitsandbytes, in place of the recipe's; calibrate, a text file by which outlier columns are chosen, to be stored
    beside the weights, and which inputs the scales of mse matter for; outlier_columns of each weight, "auto" for as
    many as are worth it; smooth, SmoothQuant's alpha between 0 and 1, to move outliers of activations into the weights
    by that text; recipe, a shipped name or a .toml file, of the first two formats; scale, absmax, or mse to search the
    one with the least squared error (ops/scales.py), of the int8 formats; device, auto, cpu or cuda (auto: a GPU that
    kernels can use, else the CPU; scales are searched on the CPU alone); workers, threads that read, quantize and write
    side by side (default: one a processor); stream, read a hub model's weights by range and store none of them, one
    thread a file; push_to_hub, a model id to upload the artifact to, new ones `private`; progress, called with bytes of
    source done and in all.
    Raises: SourceError, WeightError, RecipeError, OutputError or DependencyError; then no output folder is left.
    """
    if workers is not None and workers < 1:
        raise OutputError(f"workers {workers}: must be 1 or more")
    start = time.perf_counter()
    device = _device_for(scale, device)
    output = make_format(format, scheme, moe)
    chosen = load_recipe(recipe, threshold)
    if threshold is not None and output.name != DEFAULT_FORMAT:
        raise OutputError(f"threshold {threshold:g}: --format {output.name} has no place for it; leave it out")
    if recipe != DEFAULT_RECIPE and not isinstance(output, Int8Format):
        raise OutputError(f"recipe {recipe}: --format {output.name} takes none; leave it out")
    text = _calibration_text(calibrate, output, scale)
    columns = _count(outlier_columns, text is not None)
    _check_alpha(smooth, text is not None)
    checkpoint = open_checkpoint(source, revision=revision, token=token, stream=stream or is_url(source))
    target = Path(out) if out is not None else Path(f"{checkpoint.name}-{output.suffix}")
    check_output(target, overwrite, checkpoint.folder)
    plan = make_plan(checkpoint, chosen, output, max_shard_size)
    found = {} if text is None else _calibrate(plan, text, columns, smooth)
    if scale == MSE:
        plan.searches = _searches(plan, found)
    calibration = {} if text is None else _calibration_entry(text, columns, smooth)
    if dry_run:
        return Conversion(target, plan, time.perf_counter() - start)
    check_disk(target, plan.output_bytes)
    if push_to_hub is not None:
        prepare(push_to_hub, token=token)
    with staged(target, overwrite) as folder:
        try:
            manifest = _write(plan, folder, _quantizers(device, workers), calibration, progress)
        except OSError as error:
            where = f" at {error.filename}" if error.filename else ""
            raise OutputError(f"{target}: not written ({error.strerror}{where}); mend that and run again") from None
    errors = {name: record.quantized for name, record in manifest.tensors.items() if record.quantized}
    done = Conversion(target, plan, time.perf_counter() - start, manifest, errors)
    if push_to_hub is not None:
        done.pushed = upload(target, push_to_hub, private=private, token=token)
    return done


def _calibration_text(path: str | Path | None, output: Format, scale: str) -> str | None:
    """The text to calibrate with, if any."""
    if path is None:
        return None
    if not isinstance(output, Int8Format) and not (output.name == GGUF and scale == MSE):
        raise OutputError(f"calibrate {path}: --format {output.name} has no place for outlier columns; leave it out")
    from quantize8.model.text import read_text

    return read_text(Path(path))


def _count(columns: int | str, calibrates: bool) -> int | None:
    """How many outlier columns each weight gets; None where calibration decides."""
    if columns == "auto":
        return None
    if not calibrates:
        raise OutputError(f"outlier-columns {columns}: are chosen from a text; add --calibrate FILE")
    if not str(columns).isdecimal():
        raise OutputError(f"outlier-columns {columns}: must be auto, or a number from 0")
    return int(columns)


def _check_alpha(smooth: float | None, calibrates: bool) -> None:
    if smooth is not None and not calibrates:
        raise OutputError(f"smooth {smooth:g}: is measured on a text; add --calibrate FILE")
    if smooth is not None and not 0 < smooth < 1:
        raise OutputError(f"smooth {smooth:g}: must lie between 0 and 1")


def _calibration_entry(text: str, columns: int | None, smooth: float | None) -> dict[str, Any]:
    """What the manifest says of the calibration."""
    from quantize8.model.calibration import DEFAULT_TOKENS

    asked: dict[str, Any] = {"outlier_columns": "auto" if columns is None else columns, "smooth": smooth}
    return {"text_blake3": digest(text.encode()), "tokens": DEFAULT_TOKENS, **asked}


def _calibrate(plan: Plan, text: str, columns: int | None, alpha: float | None) -> dict[str, Calibrated]:
    """What the text says of each weight, which is smoothed first with an `alpha`.

    Where the format has int8 modules, their outlier columns get their place.
    """
    from quantize8.model.calibration import calibrate
    from quantize8.model.smoothing import check_smoothable, smooth

    if alpha is not None:
        check_smoothable(plan.checkpoint)
        plan.checkpoint = smooth(plan.checkpoint, calibrate(plan.checkpoint, text, 0), alpha)
    weights = [*plan.quantized, *(f"{name}.weight" for name in plan.modules)]
    found = calibrate(plan.checkpoint, text, columns, modules={name.removesuffix(".weight") for name in weights})
    if isinstance(plan.format, Int8Format):
        plan.keep_outliers(found)
    return found


def _device_for(scale: str, device: str) -> str:
    """Where weights are quantized: cpu or cuda."""
    if scale not in get_args(Scale):
        raise OutputError(f"scale {scale}: unknown; name one of {', '.join(get_args(Scale))}")
    if scale == MSE and device == "cuda":
        raise OutputError("scale mse: is searched on the CPU; leave out --device cuda")
    return "cpu" if scale == MSE and device == "auto" else resolve(device)


def _searches(plan: Plan, calibrated: dict[str, Calibrated]) -> dict[str, ScaleSearch]:
    """A search of the scales of every weight that is quantized here."""
    if not isinstance(plan.format, Int8Format) and not plan.gguf:
        raise OutputError(f"scale {MSE}: --format {plan.format.name} has no place for it; leave it out")
    if not plan.quantized:
        raise OutputError(f"scale {MSE}: {plan.checkpoint.name} is int8 already, with its scales; leave it out")
    known = {f"{name}.weight": found for name, found in calibrated.items()}
    return {name: known[name].search if name in known else ScaleSearch() for name in plan.quantized}


def _write(
    plan: Plan,
    folder: Path,
    quantizers: list[WeightQuantizer],
    calibration: dict[str, Any],
    progress: Progress | None,
) -> Manifest:
    """Fill an empty folder with the artifact; returns its manifest, which is written last."""
    checkpoint = plan.checkpoint
    manifest = Manifest(
        __version__,
        plan.format.name,
        checkpoint.identity,
        plan.recipe.as_json(),
        plan.source_bytes,
        kept=plan.kept,
        calibration=calibration,
    )
    with Writer(plan, folder, progress) as writer:
        for records in _in_threads(partial(write_lane, writer, checkpoint), lanes(checkpoint), quantizers):
            manifest.tensors.update(records)
        checkpoint.confirm()
        manifest.tensors.update(writer.write_computed())
        writer.flush()
    manifest.headers = {shard.file: digest(shard.header) for shard in plan.files}
    if plan.format.is_folder:
        checkpoint.write_companions(folder)
        config = plan.format.edit_config(checkpoint.config, plan)
        indexed = index(plan.shards, always=plan.outliers is not None)
        for name, data in {**indexed, CONFIG_NAME: json.dumps(config, indent=2).encode() + b"\n"}.items():
            write_file(folder / name, data)
    others = (path for path in sorted(folder.rglob("*")) if path.is_file())
    manifest.files = {
        path.relative_to(folder).as_posix(): digest(path.read_bytes())
        for path in others
        if path.name not in manifest.headers
    }
    write_file(folder / MANIFEST_NAME, manifest.to_bytes())
    return manifest


def _quantizers(device: str, workers: int | None) -> list[WeightQuantizer]:
    """One for each worker; several GPUs get at least one each."""
    count = workers or min(os.cpu_count() or 1, _MAX_WORKERS)
    if device == "cpu":
        return [CpuQuantizer() for _ in range(count)]
    import torch

    from quantize8.ops.stream import GpuQuantizer

    gpus = torch.cuda.device_count()
    return [GpuQuantizer(torch.device("cuda", i % gpus)) for i in range(max(count, gpus))]


def _in_threads(
    work: Callable[[Lane, WeightQuantizer, Event], dict[str, TensorRecord]],
    items: list[Lane],
    quantizers: list[WeightQuantizer],
) -> list[dict[str, TensorRecord]]:
    """Results of `work` on each item, as many at once as there are quantizers; the first failure stops the rest."""
    free: SimpleQueue[WeightQuantizer] = SimpleQueue()
    stopped = Event()
    for quantizer in quantizers:
        free.put(quantizer)

    def with_one(item: Lane) -> dict[str, TensorRecord]:
        quantizer = free.get()
        try:
            return work(item, quantizer, stopped)
        finally:
            free.put(quantizer)

    with ThreadPoolExecutor(len(quantizers)) as pool:
        futures: list[Future[dict[str, TensorRecord]]] = [pool.submit(with_one, item) for item in items]
        try:
            wait(futures, return_when=FIRST_EXCEPTION)
        finally:
            stopped.set()
            for future in futures:
                future.cancel()
        # of several failures the earliest in storage order, so that the message does not depend on the threads
        failed = [future for future in futures if not future.cancelled() and future.exception()]
        return [future.result() for future in (failed or futures)]
