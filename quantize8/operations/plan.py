"""What a conversion would make, and what it takes: time, memory and disk, on one machine and on several."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from quantize8.artifact.formats import DEFAULT_FORMAT
from quantize8.artifact.layout import DEFAULT_SHARD_SIZE
from quantize8.artifact.store import place_of
from quantize8.checkpoint import is_url
from quantize8.conversion.forecast import MACHINES
from quantize8.conversion.request import Request
from quantize8.conversion.result import Conversion
from quantize8.conversion.steps import look_ahead
from quantize8.conversion.write import make_quantizers
from quantize8.errors import OutputError
from quantize8.ops.scales import ABSMAX
from quantize8.recipe import DEFAULT_RECIPE


def plan(
    source: str,
    out: str | Path | None = None,
    *,
    machines: Sequence[int] = MACHINES,
    format: str = DEFAULT_FORMAT,
    scheme: str | None = None,
    moe: str | None = None,
    threshold: float | None = None,
    recipe: str = DEFAULT_RECIPE,
    scale: str = ABSMAX,
    device: str = "auto",
    max_shard_size: str = DEFAULT_SHARD_SIZE,
    workers: int | None = None,
    stream: bool = False,
    revision: str | None = None,
    token: str | None = None,
) -> Conversion:
    """Plan what `convert` with the same arguments does, and measure on a few tensors how long `machines` take for it.

    Nothing stays on the disk, and weights of the hub are not downloaded. Each machine is taken to be like this one, to
    write the weight files that `--part` would give it, and to read and write as fast as this one does alone.
    Returns a Conversion with a `forecast`. Raises what `convert` does before it begins.
    """
    start = time.perf_counter()
    if not machines or min(machines) < 1:
        raise OutputError("machines: must be numbers from 1; name some like 1,8,64")
    request = Request(
        source, revision, format, scheme, moe, threshold, recipe=recipe, scale=scale, max_shard_size=max_shard_size,
        stream=stream or is_url(source),
    )  # fmt: skip
    quantizers = make_quantizers(device, scale, workers)
    place = None if out is None else place_of(out, token)
    found = look_ahead(request, place, None, quantizers, machines=machines, overwrite=True, token=token)
    found.seconds = time.perf_counter() - start
    return found
