"""Where the files that ship with the package are: kernels (`cuda/`) and recipes (`configs/`)."""

from pathlib import Path

_PACKAGE = Path(__file__).parent


def resource_dir(name: str) -> Path:
    """Folder `cuda` or `configs`: inside the package in a wheel, beside it in a checkout."""
    inside, beside = _PACKAGE / name, _PACKAGE.parent / name
    return inside if inside.is_dir() else beside
