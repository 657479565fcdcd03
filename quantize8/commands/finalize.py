"""Finish a conversion in parts: combine the weight files that several processes wrote into an artifact."""

from __future__ import annotations

import time
from pathlib import Path

from quantize8.conversion import driver
from quantize8.conversion.result import Conversion
from quantize8.destinations.base import destination_of


def finalize(out: str | Path, *, overwrite: bool = False, token: str | None = None) -> Conversion:
    """Write the index, config and manifest for the weight files that `convert --part` wrote, and publish the artifact.

    The source is opened again to read its headers and small files.

    Args:
        out: The `out` of `convert --part`: a folder or an address.
        overwrite: Replace an existing artifact.
        token: Hub token.

    Returns:
        What was written, with the error of each weight.

    Raises:
        OutputError: A weight file is missing, incomplete, or was written with other options than the rest. The message
            names the file and the command that writes it.
        SourceError: The source cannot be opened.
    """
    start = time.perf_counter()
    result = driver.finalize(destination_of(out, token), overwrite, token)
    result.seconds = time.perf_counter() - start
    return result
