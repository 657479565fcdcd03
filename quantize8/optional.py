"""The packages of the extra `run`, which quantize8 installs without: whether they are here, and what to do if not.

Converting, verifying, planning, inspecting weights and uploading work without them wherever names and shapes are
enough. What does need one of them calls `require` before it begins, so that the user sees one line instead of an
ImportError.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re

from quantize8.errors import DependencyError

# Package -> the oldest release that works, as in pyproject.toml (a test holds the two equal): a user may have an older
# one, because an installation without the extra does not look at it.
RUN = {"torch": (2, 8), "transformers": (5, 20), "accelerate": (1, 10)}
COMMAND = "pip install 'quantize8[run]'"


def require(purpose: str, *packages: str) -> None:
    """Raise DependencyError where a package of the extra `run` is missing or too old.

    Args:
        purpose: What needs it, as a phrase after "needed", such as "to run a model" or "for --calibrate".
        packages: Names of packages in `RUN`; all of them if none is given.
    """
    if reason := problem(purpose, *packages):
        raise DependencyError(reason)


def problem(purpose: str, *packages: str) -> str | None:
    """The message of `require`; None where every package can be used."""
    for package in packages or RUN:
        if reason := fault(package, installed(package)):
            return f"{package}: {reason}, needed {purpose}: {COMMAND}"
    return None


def fault(package: str, version: str | None) -> str | None:
    """What is wrong with this version of a package of `RUN`; None where it can be used."""
    if version is None:
        return "not installed"
    numbers, oldest = tuple(map(int, re.findall(r"\d+", version)[:2])), RUN[package]
    return f"{version} is older than {'.'.join(map(str, oldest))}" if numbers and numbers < oldest else None


def installed(package: str) -> str | None:
    """The version of a package, None where Python does not find it; the package is not imported."""
    try:
        if importlib.util.find_spec(package) is None:
            return None
    except (ImportError, ValueError):  # a finder refuses it; or it is in sys.modules without a spec
        return None
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"  # imported from a folder that pip did not install
