"""The end of a conversion in parts: an artifact of the weight files that several processes have written."""

from __future__ import annotations

import time
from pathlib import Path

from quantize8.artifact.store import place_of
from quantize8.conversion.result import Conversion
from quantize8.conversion.steps import end_parts


def finalize(out: str | Path, *, overwrite: bool = False, token: str | None = None) -> Conversion:
    """Write index, config and manifest beside the weight files that `convert --part` wrote, and move all into place.

    The source is opened again, for its headers and small files. Raises OutputError, in one line that names what is
    missing and the command for it, where a weight file is not there, not whole, or of other options than the rest.
    """
    start = time.perf_counter()
    found = end_parts(place_of(out, token), overwrite, token)
    found.seconds = time.perf_counter() - start
    return found
