"""Where files are: those that ship with the package (`cuda/`, `configs/` and a text), and what is kept for later."""

from pathlib import Path

from platformdirs import user_cache_path

_PACKAGE = Path(__file__).parent
TEXT = _PACKAGE / "texts" / "sotu-1981.txt"  # the address's beginning: public domain (US government)


def resource_dir(name: str) -> Path:
    """Folder `cuda` or `configs`: inside the package in a wheel, beside it in a checkout."""
    inside, beside = _PACKAGE / name, _PACKAGE.parent / name
    return inside if inside.is_dir() else beside


def cache_dir(name: str) -> Path:
    """A folder of the user's cache, which need not be there yet."""
    return user_cache_path("quantize8", appauthor=False) / name
