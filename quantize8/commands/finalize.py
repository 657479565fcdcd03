"""The end of a conversion in parts: an artifact of the weight files that several processes have written."""

from __future__ import annotations

import time
from pathlib import Path

from quantize8.conversion import driver
from quantize8.conversion.result import Conversion
from quantize8.destinations.base import destination_of


def finalize(out: str | Path, *, overwrite: bool = False, token: str | None = None) -> Conversion:
    """Write index, config and manifest beside the weight files that `convert --part` wrote, and move all into place.

    The source is opened again, for its headers and small files.

    Args:
        out: Folder or address that `convert --part` was given.
        overwrite: Replace an artifact that is there.
        token: Hub token.

    Raises:
        OutputError: A weight file is not there, not whole, or of other options than the rest. The message names it,
            and the command that writes it.
    """
    start = time.perf_counter()
    result = driver.finalize(destination_of(out, token), overwrite, token)
    result.seconds = time.perf_counter() - start
    return result
