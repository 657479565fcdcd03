"""Convert a checkpoint to an artifact with little memory: a few blocks of rows, never a weight file or the model.

Everything that headers alone determine is settled first: names, shapes, positions in the output, disk space. Then each
tensor is read, quantized, hashed and written block by block. A journal records what is finished, so that the same
command resumes where it was stopped, and several processes can each write a share of the weight files.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from quantize8.artifact.manifest import CHECK_FAILED, Manifest
from quantize8.conversion import driver
from quantize8.conversion.driver import Progress, make_quantizers
from quantize8.conversion.options import ConvertOptions, options_of, takes_options
from quantize8.conversion.parts import Part, parse_part
from quantize8.conversion.plan import make_plan
from quantize8.conversion.result import Conversion
from quantize8.destinations.base import destination_of
from quantize8.destinations.local import LocalFolder
from quantize8.errors import ArtifactError, OutputError, Quantize8Error
from quantize8.kernels import GPTQ, NEAREST
from quantize8.optional import problem, require
from quantize8.runtime.comparison import Check
from quantize8.sources import open_checkpoint

LOCAL, RAY = ENGINES = ("local", "ray")
# Time of a check: importing torch and transformers, then several passes over the weights. Measured on two cores.
_CHECK_SECONDS, _CHECK_SECONDS_A_WEIGHT = 3.0, 7e-9


@takes_options
def convert(
    source: str | ConvertOptions,
    out: str | Path | None = None,
    *,
    device: str = "auto",
    workers: int | None = None,
    check: bool | None = None,
    dry_run: bool = False,
    overwrite: bool = False,
    part: str | None = None,
    engine: str = LOCAL,
    address: str | None = None,
    push_to_hub: str | None = None,
    private: bool = False,
    token: str | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> Conversion:
    """Convert a checkpoint to an int8 artifact, or dequantize one with a floating-point format.

    Calling it again with the same arguments resumes a conversion that was stopped.

    Args:
        source: Hub id, folder, file or address such as s3://bucket/model; or a ConvertOptions.
        out: The new folder, or an address in a store such as s3://bucket/model-int8. Default: a folder named after the
            source and the format, such as `<name>-int8`, in the current folder.
        device: auto, cpu or cuda. auto uses a GPU if the kernels support it, else the CPU. The search for scales runs
            on the CPU.
        workers: Threads that read, quantize and write in parallel; None for the number of CPUs.
        check: Compare the finished artifact with its source (`runtime.check`). None to do so if that is expected to
            take less time than the conversion took, and torch and transformers are installed.
        dry_run: Plan from headers, predict how long the conversion would take, and write nothing.
        overwrite: Replace an artifact at `out`; start over if the unfinished work there has other options.
        part: "2/4" to write the second quarter of the weight files; when all parts are written, `finalize` makes them
            an artifact. "auto" for the share of this process in a Slurm array or under torchrun.
        engine: local, or ray to write the weight files on the nodes of a Ray cluster.
        address: Ray cluster address; None for RAY_ADDRESS, else a cluster on this machine.
        push_to_hub: Id of the model on the hub to upload the artifact to.
        private: If that model is new, make it private.
        token: Hub token.
        progress: Called with the bytes of the source that are done, and their total.
        **options: Fields of `ConvertOptions`, such as format, threshold, recipe, scale and calibrate.

    Returns:
        What was written, with the error of each weight.

    Raises:
        SourceError: The source is missing, damaged, unsafe, or changed while it was read.
        WeightError: A weight cannot be converted, for example because it contains NaN.
        RecipeError: The recipe is missing or invalid.
        OutputError: The options do not fit, or the output cannot be written.
        DependencyError: A package or a device that an option needs is missing.
        ArtifactError: The check found that the artifact is broken. It is marked, so that `verify` and `push` refuse it.
            After any of the other errors there is no new artifact.
    """
    start = time.perf_counter()
    asked, share = options_of(source, options), None if part is None else parse_part(part)
    destination = None if out is None else destination_of(out, token)
    is_local = destination is None or isinstance(destination, LocalFolder)
    if engine != LOCAL or address is not None:
        _check_engine(engine, address, share)
    if check or push_to_hub is not None:
        _refuse(check, push_to_hub, asked, share, None if is_local else destination)
    quantizers = make_quantizers(device, asked.scale, workers) if engine == LOCAL or dry_run else []
    if dry_run:
        from quantize8.conversion.forecast import look_ahead

        result = look_ahead(asked, destination, quantizers, part=share, overwrite=overwrite, token=token)
        result.seconds = time.perf_counter() - start
        return result
    plan = make_plan(asked, token)
    destination = destination or LocalFolder(plan.default_out)
    destination.check(plan.checkpoint.folder, overwrite)
    if push_to_hub is not None:
        from quantize8.artifact.upload import prepare, upload

        prepare(push_to_hub, token=token)
    if engine == LOCAL:
        result = driver.write(plan, destination, share, quantizers, overwrite, progress)
    else:
        from quantize8.conversion import cluster

        result = cluster.write_all(
            plan, destination, cluster.Nodes(address, device, workers), overwrite, token, progress
        )
    elapsed = time.perf_counter() - start
    if check or (check is None and elapsed >= _CHECK_SECONDS):
        _check_artifact(result, check, elapsed)
    if push_to_hub is not None and isinstance(result.out, Path):
        result.pushed = upload(result.out, push_to_hub, private=private, token=token)
    result.seconds = time.perf_counter() - start
    return result


def _check_engine(engine: str, address: str | None, share: Part | None) -> None:
    if engine not in ENGINES:
        raise OutputError(f"engine {engine}: unknown; name one of {', '.join(ENGINES)}")
    if engine == LOCAL and address is not None:
        raise OutputError(f"address {address}: is only for a Ray cluster; add --engine ray")
    if engine != LOCAL and share is not None:
        raise OutputError(f"part {share}: the Ray cluster distributes all weight files itself; leave out --part")


def _refuse(
    check: bool | None, push_to_hub: str | None, asked: ConvertOptions, share: Part | None, store: object | None
) -> None:
    """Refuse to check or push what will not be a complete artifact on this machine."""
    if share is not None and push_to_hub is not None:
        raise OutputError(f"push-to-hub {push_to_hub}: a part is not an artifact; push it after quantize8 finalize")
    if check and share is not None:
        raise OutputError(f"check: part {share} is not an artifact; leave out --check")
    if check and asked.stream:
        raise OutputError("check: reads the source's weights again, but --stream does not store them; leave one out")
    if check:
        require("for --check")
    if store is not None and check:
        raise OutputError(f"check: needs the artifact on this machine, not at {store}; leave out --check")
    if store is not None and push_to_hub is not None:
        raise OutputError(f"push-to-hub {push_to_hub}: needs files on this machine, not at {store}; leave one out")


def _rounding(manifest: Manifest) -> str:
    """How the codes of an artifact were chosen, nearest or gptq."""
    found = {record.quantized.rounding for record in manifest.tensors.values() if record.quantized is not None}
    return GPTQ if GPTQ in found else NEAREST


def _check_artifact(result: Conversion, check: bool | None, seconds: float) -> None:
    """Check a complete artifact on this machine if requested, or if that takes less time than converting (`seconds`).

    A check that was not requested is skipped when a package that it needs is missing. A broken artifact is marked, so
    that `verify` and `push` refuse it, and ArtifactError is raised.
    """
    source, out = result.plan.checkpoint, result.out
    expected = _CHECK_SECONDS + result.plan.weights * _CHECK_SECONDS_A_WEIGHT
    wanted = check or (not source.is_remote and expected <= seconds)
    if not wanted or result.manifest is None or not isinstance(out, Path):
        return
    reason = result.plan.format.incomparable(source.config) or (problem("for a check") if check is None else "")
    if reason:
        result.check = Check(skipped=reason)
        return
    from quantize8.runtime.check import check as compare

    try:
        result.check = compare(source, open_checkpoint(str(out)), _rounding(result.manifest))
    except Quantize8Error as error:
        (out / CHECK_FAILED).write_text(f"{error}\n", encoding="utf-8")
        raise ArtifactError(str(error)) from None
