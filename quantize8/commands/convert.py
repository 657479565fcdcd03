"""Checkpoint to int8 artifact, streaming: memory holds a few blocks of rows, never a weight file or the model.

Everything that can be known from headers alone is settled first (names, shapes, places in the output, disk space).
Then each tensor is read, quantized, hashed and written block by block. What is finished is noted in a journal, so that
the same command goes on where it was stopped, and several processes can each write a share of the weight files.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from quantize8.artifact.manifest import CHECK_FAILED
from quantize8.conversion import driver
from quantize8.conversion.driver import Progress, make_quantizers
from quantize8.conversion.options import ConvertOptions, options_of, takes_options
from quantize8.conversion.parts import Part, parse_part
from quantize8.conversion.plan import make_plan
from quantize8.conversion.result import Conversion
from quantize8.destinations.base import destination_of
from quantize8.destinations.local import LocalFolder
from quantize8.errors import ArtifactError, OutputError, Quantize8Error
from quantize8.optional import problem, require
from quantize8.runtime.comparison import Check
from quantize8.sources import open_checkpoint

LOCAL, RAY = ENGINES = ("local", "ray")
# What a check takes: torch and transformers once, then some passes over the weights. Measured on two cores.
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
    """Write an artifact of a checkpoint: int8, or with a floating-point format the plain numbers of a quantized one.

    A conversion that was stopped goes on where it was when it is called with the same arguments.

    Args:
        source: Hub id, folder, file or address such as s3://bucket/model; or a ConvertOptions.
        out: The new folder, or an address in a store such as s3://bucket/model-int8. Default: the source's name with
            the format, such as `<name>-int8`, in the current folder.
        device: auto, cpu or cuda. auto is a GPU that the kernels can use, else the CPU; scales are searched on the CPU.
        workers: Threads that read, quantize and write side by side; None for one for each processor.
        check: Compare the finished artifact with its source (`runtime.check`); None to do so where that takes less time
            than converting did, and torch and transformers are installed.
        dry_run: Settle all that headers tell, predict how long the rest takes, and write nothing.
        overwrite: Replace an artifact at `out`; start over what is unfinished there with other options.
        part: "2/4" to write the second quarter of the weight files, which `finalize` makes an artifact of when all
            are there; "auto" for the share of this process in a Slurm array or under torchrun.
        engine: local, or ray to have the nodes of a Ray cluster write the weight files.
        address: Ray cluster address; None is RAY_ADDRESS, else a cluster on this machine.
        push_to_hub: Model id to upload the artifact to.
        private: Make a new model on the hub private.
        token: Hub token.
        progress: Called with bytes of the source done and in all.
        **options: Fields of `ConvertOptions`, such as format, threshold, recipe, scale and calibrate.

    Returns:
        What was written, with the error of each weight.

    Raises:
        SourceError, WeightError, RecipeError, OutputError, DependencyError: Then there is no output folder.
        ArtifactError: The check found the artifact broken; it is marked, and `verify` and `push` refuse it.
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
        raise OutputError(f"address {address}: is that of a Ray cluster; add --engine ray")
    if engine != LOCAL and share is not None:
        raise OutputError(f"part {share}: the cluster shares out all weight files itself; leave out --part")


def _refuse(
    check: bool | None, push_to_hub: str | None, asked: ConvertOptions, share: Part | None, store: object | None
) -> None:
    """Refuse to check or push what is not a whole artifact on this machine."""
    if share is not None and push_to_hub is not None:
        raise OutputError(f"push-to-hub {push_to_hub}: a part is no artifact; push it after quantize8 finalize")
    if check and share is not None:
        raise OutputError(f"check: part {share} is no artifact; leave --check out")
    if check and asked.stream:
        raise OutputError("check: reads the weights of the source again, which a stream does not keep; leave one out")
    if check:
        require("for --check")
    if store is not None and check:
        raise OutputError(f"check: reads an artifact that is here, not at {store}; leave it out")
    if store is not None and push_to_hub is not None:
        raise OutputError(f"push-to-hub {push_to_hub}: takes files that are here, not at {store}; leave out one")


def _check_artifact(result: Conversion, check: bool | None, seconds: float) -> None:
    """Check a whole artifact that is here, where that was asked for, or costs less than the `seconds` of converting.

    The check is skipped where nobody asked for it and a package that it needs is missing. An artifact that is broken is
    marked, so that `verify` and `push` refuse it, and raises ArtifactError.
    """
    source, out = result.plan.checkpoint, result.out
    expected = _CHECK_SECONDS + result.plan.weights * _CHECK_SECONDS_A_WEIGHT
    wanted = check or (not source.is_remote and expected <= seconds)
    if not wanted or result.manifest is None or not isinstance(out, Path):
        return
    if check is None and (reason := problem("for a check")):
        result.check = Check(skipped=reason)
        return
    from quantize8.runtime.check import check as compare

    try:
        result.check = compare(source, open_checkpoint(str(out)))
    except Quantize8Error as error:
        (out / CHECK_FAILED).write_text(f"{error}\n", encoding="utf-8")
        raise ArtifactError(str(error)) from None
