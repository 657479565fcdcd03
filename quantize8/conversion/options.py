"""The single definition of the options that decide an artifact's bytes.

`quantize8 convert` and `quantize8 plan` have a command-line option for each field, with its help text.
`quantize8.convert` and `quantize8.plan` take a `ConvertOptions`, or its fields as keywords. Journals record the
options, so that another process can resume the conversion. To add an option, add a field here and use it.
"""

from __future__ import annotations

import inspect
import shlex
from collections.abc import Callable
from dataclasses import MISSING, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, TypeVar

from quantize8.errors import OutputError
from quantize8.files import TEXT, is_url
from quantize8.formats import (
    COMPRESSED_TENSORS,
    DEFAULT_FORMAT,
    DEFAULT_SHARD_SIZE,
    FORMATS,
    GROUP_SIZES,
    GROUPED_SCHEME,
    MOE_LOADERS,
    SCHEMES,
)
from quantize8.kernels import ABSMAX, GPTQ, MSE, NEAREST, ROTATIONS, ROUNDINGS, SCALES
from quantize8.recipe import DEFAULT_RECIPE

_, BEST = PRESETS = ("llm-int8", "best")
_AUTO = "auto"
# Options whose effect a plan already records as its source, format, recipe, calibration or layout
_RECORDED = {
    "source",
    "revision",
    "adapter",
    "stream",
    "format",
    "scheme",
    "moe",
    "group_size",
    "rotate",
    "recipe",
    "threshold",
    "max_shard_size",
}
_RECORDED |= {"calibrate", "outlier_columns", "smooth"}
_Function = TypeVar("_Function", bound=Callable[..., Any])


def _option(default: Any, help: str, metavar: str | None = None) -> Any:
    """A field with its help on the command line, where a field without a default is an argument."""
    return field(default=default, metadata={"help": help, "metavar": metavar})


@dataclass(frozen=True)
class ConvertOptions:
    """Everything that decides the bytes of an artifact.

    Attributes:
        source: Hub id, folder, file (.safetensors, .bin, .gguf) or address such as s3://bucket/model.
        revision: Branch, tag or commit of a hub model.
        adapter: Folder of a LoRA adapter (PEFT) that is merged into the source before it is rounded.
        format: One of `formats.FORMATS`.
        scheme: w8a8 or w8a16, for compressed-tensors; None for w8a8.
        moe: Loader whose layout of experts is written, vllm or transformers, for compressed-tensors; None for vllm.
        group_size: Weights that share a scale, for scheme w8a16; None for one scale per row.
        rotate: Size of the blocks of input features that a Hadamard matrix rotates, for compressed-tensors; None for no
            rotation. Where a block does not divide a layer's inputs, the next smaller size is taken.
        threshold: Outlier threshold on |x|, instead of the recipe's; 0 turns off the outlier decomposition.
        calibrate: Text file to calibrate with. It decides which outlier columns are stored, and which errors the
            search for scales weights most.
        outlier_columns: Number of outlier columns per weight, or "auto" for as many as are worth their cost.
        smooth: SmoothQuant's alpha, between 0 and 1; moves activation outliers into the weights.
        recipe: Name of a shipped recipe, or a .toml file.
        scale: absmax, or mse to search for the scales with the least squared error (`kernels.scales`).
        rounding: nearest, or gptq to choose codes by the error of a layer's output on the calibration text
            (`kernels.rounding`).
        preset: llm-int8, or best for what measured best in the format (docs/accuracy.md): it sets `rounding`, `rotate`,
            and `calibrate` to the text in this package, where they are not given, and is llm-int8 afterwards.
        max_shard_size: Size of the largest weight file, such as 5GB or 512MiB.
        stream: Read remote weights by byte range instead of downloading them; the artifact is the same.

    Raises:
        OutputError: A value is unknown, or the format does not support the option.
    """

    source: str = _option(MISSING, "Hub id, folder, .safetensors, .bin or .gguf file, or s3://...")
    revision: str | None = _option(None, "Branch, tag or commit of a hub model.")
    adapter: str | None = _option(None, "Folder of a LoRA adapter to merge into the source.", "DIR")
    format: str = _option(DEFAULT_FORMAT, f"{', '.join(FORMATS[:-1])} or {FORMATS[-1]}.")
    scheme: str | None = _option(None, f"For compressed-tensors: {' or '.join(SCHEMES)}.  [default: {SCHEMES[0]}]")
    moe: str | None = _option(
        None, f"Loader to write experts for: {' or '.join(MOE_LOADERS)}.  [default: {MOE_LOADERS[0]}]"
    )
    group_size: int | None = _option(
        None, f"For {GROUPED_SCHEME}: weights that share a scale, {', '.join(map(str, GROUP_SIZES))}.  [default: a row]"
    )
    rotate: int | None = _option(
        None, f"For compressed-tensors: rotate inputs in blocks of {', '.join(map(str, ROTATIONS))}.", "SIZE"
    )
    threshold: float | None = _option(None, "Outlier threshold; 0 for none.  [default: the recipe's]")
    calibrate: str | None = _option(None, "Calibration text, which decides the outlier columns.", "FILE")
    outlier_columns: str = _option(_AUTO, "Outlier columns per weight: auto, or a number.")
    smooth: float | None = _option(None, "SmoothQuant's alpha, such as 0.5 (with --calibrate).")
    recipe: str = _option(DEFAULT_RECIPE, "llm-int8, int8, int8-all, int8-embeddings, towers, or a .toml file.")
    scale: str = _option(ABSMAX, "absmax, or mse for scales with the least squared error.")
    rounding: str = _option(NEAREST, "nearest, or gptq to choose codes with the calibration text.")
    preset: str = _option(PRESETS[0], "llm-int8, or best: rounding and rotation as measured best for the format.")
    max_shard_size: str = _option(DEFAULT_SHARD_SIZE, "Size of the largest weight file.")
    stream: bool = _option(False, "Read remote weights by byte range, without storing them.")

    def __post_init__(self) -> None:
        from quantize8.formats.base import make_format, parse_size

        if self.preset not in PRESETS:
            raise OutputError(f"preset {self.preset}: unknown; name one of {', '.join(PRESETS)}")
        if self.preset == BEST:
            self._take_best()
        given = {name: getattr(self, name) and str(getattr(self, name)) for name in ("adapter", "calibrate")}
        given["outlier_columns"] = str(self.outlier_columns)
        for name, value in {**given, "stream": self.stream or is_url(self.source)}.items():
            object.__setattr__(self, name, value)
        if self.scale not in SCALES:
            raise OutputError(f"scale {self.scale}: unknown; name one of {', '.join(SCALES)}")
        if self.rounding not in ROUNDINGS:
            raise OutputError(f"rounding {self.rounding}: unknown; name one of {', '.join(ROUNDINGS)}")
        output = make_format(self.format, self.scheme, self.moe, self.group_size, self.rotate)
        written = f"--format {output.name}"
        for name, value in (("group-size", self.group_size), ("rotate", self.rotate)):
            written += "" if value is None else f" --{name} {value}"
        given = {
            "threshold": None if self.threshold is None else f"{self.threshold:g}",
            "scale": None if self.scale == ABSMAX else self.scale,
            "rounding": None if self.rounding == NEAREST else self.rounding,
        }
        for name, text in given.items():
            if text is not None and name not in output.options:
                raise OutputError(f"{name} {text}: {written} does not support it; leave it out")
        if self.recipe != DEFAULT_RECIPE and "recipe" not in output.options:
            raise OutputError(f"recipe {self.recipe}: {written} does not use recipes; leave it out")
        measures = self.scale == MSE or self.rounding == GPTQ
        if self.calibrate is not None and "columns" not in output.options and not measures:
            raise OutputError(f"calibrate {self.calibrate}: {written} does not store outlier columns; leave it out")
        if self.outlier_columns != _AUTO or self.smooth is not None or self.rounding == GPTQ:
            self._check_calibration()
        parse_size(self.max_shard_size)

    def _take_best(self) -> None:
        """Set the options of the preset best where they are not given."""
        from quantize8.formats.base import make_format

        if "rounding" not in make_format(self.format, self.scheme).options:
            raise OutputError(f"preset {BEST}: --format {self.format} has no int8 weights; leave it out")
        best: dict[str, Any] = {"rounding": GPTQ, "calibrate": self.calibrate or str(TEXT), "preset": PRESETS[0]}
        if self.format == COMPRESSED_TENSORS:
            best["rotate"] = self.rotate or ROTATIONS[0]
        for name, value in best.items():
            object.__setattr__(self, name, value)

    def _check_calibration(self) -> None:
        columns, alpha = self.outlier_columns, self.smooth
        if columns != _AUTO and self.calibrate is None:
            raise OutputError(f"outlier-columns {columns}: needs calibration; add --calibrate FILE")
        if columns != _AUTO and not columns.isdecimal():
            raise OutputError(f"outlier-columns {columns}: must be auto, or a number of at least 0")
        if alpha is not None and self.calibrate is None:
            raise OutputError(f"smooth {alpha:g}: needs calibration; add --calibrate FILE")
        if alpha is not None and not 0 < alpha < 1:
            raise OutputError(f"smooth {alpha:g}: must be between 0 and 1")
        if alpha is not None and self.rotate is not None:
            raise OutputError(f"smooth {alpha:g}: does not go with --rotate, which spreads the outliers; leave one out")
        if self.rounding == GPTQ and self.calibrate is None:
            raise OutputError(f"rounding {GPTQ}: needs calibration; add --calibrate FILE")

    @property
    def column_count(self) -> int | None:
        """Number of outlier columns per weight; None if calibration decides it."""
        return None if self.outlier_columns == _AUTO else int(self.outlier_columns)

    def decisions(self) -> dict[str, Any]:
        """The options whose values `Plan.decisions` records, because nothing else in it shows their effect."""
        return {name: value for name, value in vars(self).items() if name not in _RECORDED}

    def absolute(self) -> ConvertOptions:
        """The same options with absolute paths, for a process with another working directory."""
        paths = {name: getattr(self, name) for name in ("source", "adapter", "calibrate", "recipe")}
        existing = {name: Path(text).expanduser() for name, text in paths.items() if text is not None}
        changes: dict[str, Any] = {name: str(path.absolute()) for name, path in existing.items() if path.exists()}
        return replace(self, **changes) if changes else self

    def recorded(self) -> dict[str, Any]:
        """The fields as a journal records them, with absolute paths and without secrets in an address."""
        values = vars(self.absolute()).copy()
        if is_url(self.source):
            from quantize8.sources.address import without_secrets

            values["source"] = without_secrets(self.source)
        return values

    def command(self, out: object) -> str:
        """The command line that does this conversion, with `out` as its --out."""
        absolute = self.absolute()
        words = ["quantize8", "convert", absolute.source, "--out", str(out)]
        for option in fields(self)[1:]:
            value = getattr(absolute if option.name == "adapter" else self, option.name)
            if value is True:
                words.append(f"--{option.name}")
            elif value != option.default:
                words += [f"--{option.name.replace('_', '-')}", str(value)]
        return shlex.join(words)


def options_of(source: str | ConvertOptions, given: dict[str, Any]) -> ConvertOptions:
    """The options of a call to `convert` or `plan`.

    Args:
        source: The source; or a ConvertOptions, in which the fields in `given` are replaced.
        given: Fields of ConvertOptions by name.

    Raises:
        TypeError: A field is unknown.
        OutputError: See `ConvertOptions`.
    """
    if isinstance(source, ConvertOptions):
        return replace(source, **given)
    return ConvertOptions(str(source), **given)


def takes_options(function: _Function) -> _Function:
    """Decorate `function(source, ..., **options)` so that its signature lists the fields of ConvertOptions."""
    own = inspect.signature(function, eval_str=True)
    known = inspect.signature(ConvertOptions, eval_str=True).parameters
    named = [parameter for parameter in own.parameters.values() if parameter.kind is not parameter.VAR_KEYWORD]
    added = [known[option.name].replace(kind=inspect.Parameter.KEYWORD_ONLY) for option in fields(ConvertOptions)[1:]]
    function.__signature__ = own.replace(parameters=[*named, *added])  # type: ignore[attr-defined]
    return function
