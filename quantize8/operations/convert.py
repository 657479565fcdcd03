"""Checkpoint to int8 artifact, streaming: memory holds a few blocks of rows, never a weight file or the model.

Everything that can be known from headers alone is settled first (names, shapes, places in the output, disk space).
Then each tensor is read, quantized, hashed and written block by block. What is finished is noted in a journal, so that
the same command goes on where it was stopped, and several processes can each write a share of the weight files.
"""

from __future__ import annotations

import time
from pathlib import Path

from quantize8.artifact.formats import DEFAULT_FORMAT
from quantize8.artifact.layout import DEFAULT_SHARD_SIZE
from quantize8.artifact.manifest import CHECK_FAILED
from quantize8.artifact.store import Store, place_of
from quantize8.artifact.upload import prepare, upload
from quantize8.artifact.writer import Progress
from quantize8.checkpoint import is_url, open_checkpoint
from quantize8.conversion import cluster
from quantize8.conversion.parts import Part, parse_part
from quantize8.conversion.request import Request
from quantize8.conversion.result import Conversion
from quantize8.conversion.steps import check_place, look_ahead, write_part
from quantize8.conversion.write import make_quantizers
from quantize8.errors import ArtifactError, OutputError, Quantize8Error
from quantize8.model.comparison import Check
from quantize8.ops.scales import ABSMAX
from quantize8.optional import problem, require
from quantize8.recipe import DEFAULT_RECIPE

LOCAL = "local"
# What a check takes: torch and transformers once, then some passes over the weights. Measured on two cores.
_CHECK_SECONDS, _CHECK_SECONDS_A_WEIGHT = 3.0, 7e-9
ENGINES = (LOCAL, "ray")


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
    check: bool | None = None,
    dry_run: bool = False,
    overwrite: bool = False,
    part: str | None = None,
    engine: str = LOCAL,
    address: str | None = None,
    stream: bool = False,
    push_to_hub: str | None = None,
    private: bool = False,
    revision: str | None = None,
    token: str | None = None,
    progress: Progress | None = None,
) -> Conversion:
    """Write an artifact of a checkpoint: int8, or with a floating-point format the plain numbers of a quantized one.

    Args: source, a hub id, folder or file; out, the new folder (default: the source's name with what was made of it,
    such as `<name>-int8`, in the current one) or an address in a store, such as s3://bucket/model-int8; format,
    bitsandbytes, compressed-tensors, gguf, float16, bfloat16 or float32; scheme (w8a8 or w8a16) and moe (vllm or
    transformers), of compressed-tensors alone; threshold, of bitsandbytes, in place of the recipe's; calibrate, a
    text file by which outlier columns are chosen, to be stored beside the weights, and which inputs the scales of mse
    matter for; outlier_columns of each weight, "auto" for as many as are worth it; smooth, SmoothQuant's alpha
    between 0 and 1, to move outliers of activations into the weights by that text; recipe, a shipped name or a .toml
    file, of the first two formats; scale, absmax, or mse to search the one with the least squared error
    (ops/scales.py), of the int8 formats; device, auto, cpu or cuda (auto: a GPU that kernels can use, else the CPU;
    scales are searched on the CPU alone); workers, threads that read, quantize and write side by side (default: one a
    processor); check, compare the artifact with its source when it is there (`model.check`), None to do so where that
    takes less time than converting did, and torch and transformers are here; dry_run, to settle all that headers tell,
    measure how long the rest will take, and write nothing;
    part, "2/4" to write the second fourth of the weight files, which `finalize` makes an artifact of when all are
    there, or "auto" for the share of this process in a Slurm array or under torchrun; engine, local, or ray to have
    the nodes of a Ray cluster write the weight files (`conversion.cluster`), the one at `address`; stream, read a hub
    model's weights by range and store none of them, one thread a file; push_to_hub, a model id to upload the artifact
    to, new ones `private`; progress, called with bytes of source done and in all.
    A conversion that was stopped goes on where it was when it is called with the same arguments.
    Raises: SourceError, WeightError, RecipeError, OutputError or DependencyError; then there is no output folder.
    """
    start = time.perf_counter()
    request = Request(
        source, revision, format, scheme, moe, threshold, None if calibrate is None else str(calibrate),
        outlier_columns, smooth, recipe, scale, max_shard_size, stream or is_url(source),
    )  # fmt: skip
    share = None if part is None else parse_part(part)
    if share is not None and push_to_hub is not None:
        raise OutputError(f"push-to-hub {push_to_hub}: a part is no artifact; push it after quantize8 finalize")
    _check_engine(engine, address, share)
    _refuse_check(check, request, share)
    quantizers = make_quantizers(device, scale, workers) if engine == LOCAL or dry_run else []
    place = None if out is None else place_of(out, token)
    if isinstance(place, Store) and check:
        raise OutputError(f"check: reads an artifact that is here, not at {place}; leave it out")
    if isinstance(place, Store) and push_to_hub is not None:
        raise OutputError(f"push-to-hub {push_to_hub}: takes files that are here, not at {place}; leave out one")
    if dry_run:
        found = look_ahead(request, place, share, quantizers, overwrite=overwrite, token=token)
        found.seconds = time.perf_counter() - start
        return found
    job = request.prepare(token)
    target = place or job.default_out
    check_place(target, overwrite, job.plan.checkpoint.folder)
    if push_to_hub is not None:
        prepare(push_to_hub, token=token)
    if engine == LOCAL:
        found = write_part(job, target, share, quantizers, overwrite, progress)
    else:
        nodes = cluster.Nodes(address, device, workers)
        found = cluster.write_all(job, target, nodes, overwrite, token, progress)
    _check_artifact(found, check, time.perf_counter() - start)
    if push_to_hub is not None and isinstance(target, Path):
        found.pushed = upload(target, push_to_hub, private=private, token=token)
    found.seconds = time.perf_counter() - start
    return found


def _refuse_check(check: bool | None, request: Request, share: Part | None) -> None:
    if check and share is not None:
        raise OutputError(f"check: part {share} is no artifact; leave --check out")
    if check and request.stream:
        raise OutputError("check: reads the weights of the source again, which a stream does not keep; leave one out")
    if check:
        require("for --check")


def _check_artifact(found: Conversion, check: bool | None, seconds: float) -> None:
    """Check a whole artifact that is here, where that was asked for, or costs less than the `seconds` of converting.

    Left out, and noted as skipped, where nobody asked for it and a package that it needs is missing. An artifact that
    is broken is marked, so that `verify` and `push` refuse it, and raises ArtifactError.
    """
    expected = _CHECK_SECONDS + found.plan.weights * _CHECK_SECONDS_A_WEIGHT
    whole = found.manifest is not None and isinstance(found.out, Path)
    if not whole or check is False or (check is None and (found.plan.checkpoint.is_remote or expected > seconds)):
        return
    if check is None and (reason := problem("for a check")):
        found.check = Check(skipped=reason)
        return
    from quantize8.model.check import check as compare

    assert isinstance(found.out, Path)
    try:
        found.check = compare(found.plan.checkpoint, open_checkpoint(str(found.out)))
    except Quantize8Error as error:
        (found.out / CHECK_FAILED).write_text(f"{error}\n", encoding="utf-8")
        raise ArtifactError(str(error)) from None


def _check_engine(engine: str, address: str | None, share: Part | None) -> None:
    if engine not in ENGINES:
        raise OutputError(f"engine {engine}: unknown; name one of {', '.join(ENGINES)}")
    if engine == LOCAL and address is not None:
        raise OutputError(f"address {address}: is that of a Ray cluster; add --engine ray")
    if engine != LOCAL and share is not None:
        raise OutputError(f"part {share}: the cluster shares out all weight files itself; leave out --part")
