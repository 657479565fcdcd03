"""The options that decide an artifact's bytes: their one list.

`quantize8 convert` and `quantize8 plan` take a command-line option for each field, with its help; `quantize8.convert`
and `quantize8.plan` take a `ConvertOptions`, or its fields by keyword; journals record them, so that another process
can go on. To add one, add a field, and use it.
"""

from __future__ import annotations

import inspect
import shlex
from collections.abc import Callable
from dataclasses import MISSING, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, TypeVar

from quantize8.errors import OutputError
from quantize8.files import is_url
from quantize8.formats import DEFAULT_FORMAT, DEFAULT_SHARD_SIZE, FORMATS, MOE_LOADERS, SCHEMES
from quantize8.kernels import ABSMAX, MSE, SCALES
from quantize8.recipe import DEFAULT_RECIPE

_AUTO = "auto"
# Options whose effect on the bytes a plan records as its source, format, recipe, calibration or layout
_RECORDED = {"source", "revision", "stream", "format", "scheme", "moe", "recipe", "threshold", "max_shard_size"}
_RECORDED |= {"calibrate", "outlier_columns", "smooth"}
_Function = TypeVar("_Function", bound=Callable[..., Any])


def _option(default: Any, help: str, metavar: str | None = None) -> Any:
    """A field with what the command line says of it; one without a default is an argument there."""
    return field(default=default, metadata={"help": help, "metavar": metavar})


@dataclass(frozen=True)
class ConvertOptions:
    """Everything that decides the bytes of an artifact.

    Attributes:
        source: Hub id, folder, file (.safetensors, .bin, .gguf) or address such as s3://bucket/model.
        revision: Branch, tag or commit of a hub model.
        format: One of `formats.FORMATS`.
        scheme: w8a8 or w8a16, for compressed-tensors; None is w8a8.
        moe: Loader that experts are laid out for, vllm or transformers, for compressed-tensors; None is vllm.
        threshold: Outlier threshold on |x| in place of the recipe's; 0 turns the decomposition off.
        calibrate: Text file. It decides the outlier columns that are stored, and what searched scales favor.
        outlier_columns: How many outlier columns each weight gets, or "auto" for as many as are worth their cost.
        smooth: SmoothQuant's alpha between 0 and 1; moves outliers of activations into the weights.
        recipe: Name of a shipped recipe, or a .toml file.
        scale: absmax, or mse to search the scale with the least squared error (`kernels.scales`).
        max_shard_size: Largest weight file, such as 5GB or 512MiB.
        stream: Read remote weights by byte range instead of downloading them; the artifact is the same.

    Raises:
        OutputError: A value is unknown, or the format has no place for it.
    """

    source: str = _option(MISSING, "Hub id, folder, .safetensors, .bin or .gguf file, or s3://...")
    revision: str | None = _option(None, "Branch, tag or commit of a hub model.")
    format: str = _option(DEFAULT_FORMAT, f"{', '.join(FORMATS[:-1])} or {FORMATS[-1]}.")
    scheme: str | None = _option(None, f"For compressed-tensors: {' or '.join(SCHEMES)}.  [default: {SCHEMES[0]}]")
    moe: str | None = _option(
        None, f"Loader to lay out experts for: {' or '.join(MOE_LOADERS)}.  [default: {MOE_LOADERS[0]}]"
    )
    threshold: float | None = _option(None, "Outlier threshold; 0 for none.  [default: the recipe's]")
    calibrate: str | None = _option(None, "Text file that decides which outlier columns to store.", "FILE")
    outlier_columns: str = _option(_AUTO, "Outlier columns of each weight: auto, or a number.")
    smooth: float | None = _option(None, "SmoothQuant's alpha, such as 0.5 (with --calibrate).")
    recipe: str = _option(DEFAULT_RECIPE, "llm-int8, int8, int8-all, or a .toml file.")
    scale: str = _option(ABSMAX, "absmax, or mse for scales with the least squared error.")
    max_shard_size: str = _option(DEFAULT_SHARD_SIZE, "Size of the largest weight file.")
    stream: bool = _option(False, "Read remote weights by byte range; store none of them.")

    def __post_init__(self) -> None:
        from quantize8.formats.base import make_format, parse_size

        given = {"calibrate": self.calibrate and str(self.calibrate), "outlier_columns": str(self.outlier_columns)}
        for name, value in {**given, "stream": self.stream or is_url(self.source)}.items():
            object.__setattr__(self, name, value)
        if self.scale not in SCALES:
            raise OutputError(f"scale {self.scale}: unknown; name one of {', '.join(SCALES)}")
        output = make_format(self.format, self.scheme, self.moe)
        no_place = f"--format {output.name} has no place for it; leave it out"
        if self.threshold is not None and "threshold" not in output.options:
            raise OutputError(f"threshold {self.threshold:g}: {no_place}")
        if self.recipe != DEFAULT_RECIPE and "recipe" not in output.options:
            raise OutputError(f"recipe {self.recipe}: --format {output.name} takes none; leave it out")
        searches = self.scale == MSE and "scale" in output.options
        if self.calibrate is not None and "calibrate" not in output.options and not searches:
            name = f"--format {output.name}"
            raise OutputError(f"calibrate {self.calibrate}: {name} has no place for outlier columns; leave it out")
        if self.scale == MSE and not searches:
            raise OutputError(f"scale {MSE}: {no_place}")
        if self.outlier_columns != _AUTO or self.smooth is not None:
            self._check_calibration()
        parse_size(self.max_shard_size)

    def _check_calibration(self) -> None:
        columns, alpha = self.outlier_columns, self.smooth
        if columns != _AUTO and self.calibrate is None:
            raise OutputError(f"outlier-columns {columns}: are chosen from a text; add --calibrate FILE")
        if columns != _AUTO and not columns.isdecimal():
            raise OutputError(f"outlier-columns {columns}: must be auto, or a number from 0")
        if alpha is not None and self.calibrate is None:
            raise OutputError(f"smooth {alpha:g}: is measured on a text; add --calibrate FILE")
        if alpha is not None and not 0 < alpha < 1:
            raise OutputError(f"smooth {alpha:g}: must lie between 0 and 1")

    @property
    def column_count(self) -> int | None:
        """How many outlier columns each weight gets; None where calibration decides."""
        return None if self.outlier_columns == _AUTO else int(self.outlier_columns)

    def decisions(self) -> dict[str, Any]:
        """The options that decide bytes by themselves, for `Plan.decisions`."""
        return {name: value for name, value in vars(self).items() if name not in _RECORDED}

    def absolute(self) -> ConvertOptions:
        """The same with absolute paths, for a process with another working directory."""
        paths = {name: getattr(self, name) for name in ("source", "calibrate", "recipe")}
        existing = {name: Path(text).expanduser() for name, text in paths.items() if text is not None}
        changes: dict[str, Any] = {name: str(path.absolute()) for name, path in existing.items() if path.exists()}
        return replace(self, **changes) if changes else self

    def recorded(self) -> dict[str, Any]:
        """The fields as a journal records them: absolute paths, and no secrets of an address."""
        values = vars(self.absolute()).copy()
        if is_url(self.source):
            from quantize8.sources.address import without_secrets

            values["source"] = without_secrets(self.source)
        return values

    def command(self, out: object) -> str:
        """The command line that asks for this conversion."""
        source = str(Path(self.source).absolute()) if Path(self.source).exists() else self.source
        words = ["quantize8", "convert", source, "--out", str(out)]
        for each in fields(self)[1:]:
            value = getattr(self, each.name)
            if value is True:
                words.append(f"--{each.name}")
            elif value != each.default:
                words += [f"--{each.name.replace('_', '-')}", str(value)]
        return shlex.join(words)


def options_of(source: str | ConvertOptions, given: dict[str, Any]) -> ConvertOptions:
    """The options of a call: those that `source` is, or the fields in `given` with that source.

    Raises:
        TypeError: A field is unknown.
    """
    if isinstance(source, ConvertOptions):
        return replace(source, **given)
    return ConvertOptions(str(source), **given)


def takes_options(function: _Function) -> _Function:
    """Let `function(source, ..., **fields)` show the fields of ConvertOptions as keyword parameters of its own."""
    own = inspect.signature(function, eval_str=True)
    known = inspect.signature(ConvertOptions, eval_str=True).parameters
    kept = [each for each in own.parameters.values() if each.kind is not each.VAR_KEYWORD]
    added = [known[each.name].replace(kind=inspect.Parameter.KEYWORD_ONLY) for each in fields(ConvertOptions)[1:]]
    function.__signature__ = own.replace(parameters=[*kept, *added])  # type: ignore[attr-defined]
    return function
