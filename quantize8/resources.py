"""Where the files that ship with the package are: kernels (`cuda/`), recipes (`configs/`) and a text."""

from pathlib import Path

_PACKAGE = Path(__file__).parent
TEXT = _PACKAGE / "texts" / "sotu-1981.txt"  # the address's beginning: public domain (US government)


def resource_dir(name: str) -> Path:
    """Folder `cuda` or `configs`: inside the package in a wheel, beside it in a checkout."""
    inside, beside = _PACKAGE / name, _PACKAGE.parent / name
    return inside if inside.is_dir() else beside
