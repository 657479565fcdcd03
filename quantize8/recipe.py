"""Recipes: which modules become int8, and the outlier threshold. A recipe is a TOML file, built-in or your own."""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass, fields
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from quantize8.errors import RecipeError
from quantize8.files import resource_dir
from quantize8.limits import RECIPE_BYTES, read_bytes

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

DEFAULT_RECIPE = "llm-int8"
_LARGEST = sys.float_info.max


@dataclass(frozen=True)
class Recipe:
    """What to quantize. The keys of a recipe file are these fields, except `name`."""

    name: str
    threshold: float  # outlier threshold on |x|; 0 turns the decomposition off
    output_head: bool = False  # quantize the output head too, unless it is tied
    embeddings: bool = False  # quantize the input embedding too, and an output head that is tied to it
    towers: bool = False  # quantize vision and audio encoders and projectors too, not the language model alone
    skip: tuple[str, ...] = ()  # glob patterns of module names to leave in float

    def skips(self, module: str) -> bool:
        """Whether the recipe leaves this module in float."""
        return any(fnmatchcase(module, pattern) for pattern in self.skip)

    def as_json(self) -> dict[str, Any]:
        """The recipe as the manifest records it."""
        return {**asdict(self), "skip": list(self.skip)}


def load_recipe(name: str, threshold: float | None = None) -> Recipe:
    """Load a built-in recipe by name, or one from a TOML file.

    Args:
        name: Name of a built-in recipe, or path of a .toml file.
        threshold: Replaces the threshold of the recipe. None keeps it.

    Raises:
        RecipeError: There is no such recipe, or a key or value is invalid.
    """
    path = Path(name)
    if path.suffix != ".toml":
        path = resource_dir("configs") / f"{name}.toml"
    if not path.is_file():
        known = ", ".join(sorted(shipped.stem for shipped in resource_dir("configs").glob("*.toml")))
        raise RecipeError(f"recipe {name}: not found; use one of {known}, or the path of a .toml file")
    try:
        values = tomllib.loads(read_bytes(path, RECIPE_BYTES, RecipeError).decode())
    except (ValueError, RecursionError) as error:  # ValueError: bad TOML, bad UTF-8, a number of thousands of digits
        raise RecipeError(f"{path}: not valid TOML ({error})") from None
    if threshold is not None:
        values["threshold"] = threshold
    return _checked(values, path)


def _checked(values: dict[str, Any], path: Path) -> Recipe:
    known = [field.name for field in fields(Recipe) if field.name != "name"]
    for key in values:
        if key not in known:
            raise RecipeError(f"{path}: unknown key {key!r}; the keys of a recipe are {', '.join(known)}")
    threshold = values.get("threshold")
    if isinstance(threshold, bool) or not isinstance(threshold, int | float):
        raise RecipeError(f"{path}: threshold must be a number, such as 6.0")
    if not 0 <= threshold <= _LARGEST:
        raise RecipeError(f"{path}: threshold {threshold} must be 0 (no outlier decomposition) or a positive number")
    flags = {name: values.get(name, False) for name in ("output_head", "embeddings", "towers")}
    skip = values.get("skip", [])
    for name, value in flags.items():
        if not isinstance(value, bool):
            raise RecipeError(f"{path}: {name} must be true or false")
    if not isinstance(skip, list) or not all(isinstance(pattern, str) for pattern in skip):
        raise RecipeError(f"{path}: skip must be a list of module names, such as ['model.layers.0.*']")
    return Recipe(path.stem, float(threshold), **flags, skip=tuple(skip))
