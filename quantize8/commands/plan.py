"""What a conversion would make, and what it takes: time, memory and disk, on one machine and on several."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from quantize8.conversion.driver import make_quantizers
from quantize8.conversion.forecast import MACHINES, look_ahead
from quantize8.conversion.options import ConvertOptions, options_of, takes_options
from quantize8.conversion.result import Conversion
from quantize8.destinations.base import destination_of
from quantize8.errors import OutputError


@takes_options
def plan(
    source: str | ConvertOptions,
    out: str | Path | None = None,
    *,
    machines: Sequence[int] = MACHINES,
    device: str = "auto",
    workers: int | None = None,
    token: str | None = None,
    **options: Any,
) -> Conversion:
    """Plan what `convert` with the same arguments does, and predict how long `machines` take for it.

    The prediction converts a few tensors of each kind. Nothing stays on the disk, and weights of the hub are not
    downloaded. Each machine is taken to be like this one, to write the weight files that `--part` would give it, and to
    read and write as fast as this one does alone.

    Args:
        source: Hub id, folder, file or address; or a ConvertOptions.
        out: Where the artifact would go; see `convert`.
        machines: Numbers of machines to predict the time for.
        device: auto, cpu or cuda.
        workers: Number of threads; None for one for each processor.
        token: Hub token.
        **options: Fields of `ConvertOptions`.

    Returns:
        A Conversion with a `forecast`.

    Raises:
        Quantize8Error: What `convert` raises before it writes anything.
    """
    start = time.perf_counter()
    if not machines or min(machines) < 1:
        raise OutputError("machines: must be numbers from 1; name some like 1,8,64")
    asked = options_of(source, options)
    quantizers = make_quantizers(device, asked.scale, workers)
    destination = None if out is None else destination_of(out, token)
    result = look_ahead(asked, destination, quantizers, machines=machines, overwrite=True, token=token)
    result.seconds = time.perf_counter() - start
    return result
