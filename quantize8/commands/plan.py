"""Plan a conversion, and predict its time, memory and disk space on one machine or several."""

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
    """Plan what `convert` with the same arguments would do, and predict how long it would take.

    The prediction converts a few tensors of each kind. Nothing remains on the disk, and weights on the hub are not
    downloaded. Each machine is assumed to be like this one, to write the weight files that `--part` would give it, and
    to read and write as fast as this one does alone.

    Args:
        source: Hub id, folder, file or address; or a ConvertOptions.
        out: Where the artifact would go; see `convert`.
        machines: Numbers of machines to predict the time for.
        device: auto, cpu or cuda.
        workers: Worker threads; None for the number of CPUs.
        token: Hub token.
        **options: Fields of `ConvertOptions`.

    Returns:
        A Conversion with a `forecast`.

    Raises:
        Quantize8Error: Any error that `convert` raises before it writes anything.
    """
    start = time.perf_counter()
    if not machines or min(machines) < 1:
        raise OutputError("machines: must be numbers of at least 1; use for example 1,8,64")
    asked = options_of(source, options)
    quantizers = make_quantizers(device, asked.scale, workers)
    destination = None if out is None else destination_of(out, token)
    result = look_ahead(asked, destination, quantizers, machines=machines, overwrite=True, token=token)
    result.seconds = time.perf_counter() - start
    return result
