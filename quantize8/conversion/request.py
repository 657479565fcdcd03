"""What decides an artifact's bytes: a request, checked, and what becomes of it beside a source."""

from __future__ import annotations

import json
import shlex
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, get_args

from quantize8 import __version__
from quantize8.artifact.format import Format, Int8Format
from quantize8.artifact.formats import DEFAULT_FORMAT, make_format
from quantize8.artifact.gguf import NAME as GGUF
from quantize8.artifact.layout import DEFAULT_SHARD_SIZE, parse_size
from quantize8.artifact.manifest import digest, fits
from quantize8.artifact.plan import Plan, make_plan
from quantize8.artifact.store import Store
from quantize8.artifact.units import Unit, units
from quantize8.checkpoint import open_checkpoint
from quantize8.checkpoint.address import is_url, without_secrets
from quantize8.checkpoint.gguf import GgufCheckpoint
from quantize8.errors import OutputError
from quantize8.ops.scales import ABSMAX, MSE, Scale, ScaleSearch
from quantize8.optional import require
from quantize8.recipe import DEFAULT_RECIPE, Recipe, load_recipe


@dataclass(frozen=True)
class Request:
    """All that decides an artifact's bytes, as `convert` describes it; raises OutputError where it cannot be."""

    source: str
    revision: str | None = None
    format: str = DEFAULT_FORMAT
    scheme: str | None = None
    moe: str | None = None
    threshold: float | None = None
    calibrate: str | None = None
    outlier_columns: int | str = "auto"
    smooth: float | None = None
    recipe: str = DEFAULT_RECIPE
    scale: str = ABSMAX
    max_shard_size: str = DEFAULT_SHARD_SIZE
    stream: bool = False  # the weights are read by range; the bytes are the same

    def __post_init__(self) -> None:
        if self.scale not in get_args(Scale):
            raise OutputError(f"scale {self.scale}: unknown; name one of {', '.join(get_args(Scale))}")
        output = self.output
        leave = f"--format {output.name} has no place for it; leave it out"
        if self.threshold is not None and output.name != DEFAULT_FORMAT:
            raise OutputError(f"threshold {self.threshold:g}: {leave}")
        int8 = isinstance(output, Int8Format)
        if self.recipe != DEFAULT_RECIPE and not int8:
            raise OutputError(f"recipe {self.recipe}: --format {output.name} takes none; leave it out")
        if self.calibrate is not None and not int8 and not (output.name == GGUF and self.scale == MSE):
            name = f"--format {output.name}"
            raise OutputError(f"calibrate {self.calibrate}: {name} has no place for outlier columns; leave it out")
        if self.scale == MSE and not int8 and output.name != GGUF:
            raise OutputError(f"scale {MSE}: {leave}")
        if self.outlier_columns != "auto" and self.calibrate is None:
            raise OutputError(f"outlier-columns {self.outlier_columns}: are chosen from a text; add --calibrate FILE")
        if self.outlier_columns != "auto" and not str(self.outlier_columns).isdecimal():
            raise OutputError(f"outlier-columns {self.outlier_columns}: must be auto, or a number from 0")
        if self.smooth is not None and self.calibrate is None:
            raise OutputError(f"smooth {self.smooth:g}: is measured on a text; add --calibrate FILE")
        if self.smooth is not None and not 0 < self.smooth < 1:
            raise OutputError(f"smooth {self.smooth:g}: must lie between 0 and 1")
        parse_size(self.max_shard_size)

    @property
    def output(self) -> Format:
        """The format to write."""
        return make_format(self.format, self.scheme, self.moe)

    @property
    def columns(self) -> int | None:
        """How many outlier columns each weight gets; None where calibration decides."""
        return None if self.outlier_columns == "auto" else int(self.outlier_columns)

    def anywhere(self) -> Request:
        """The same with absolute paths, for a process with another working directory."""
        paths = {"source": self.source, "calibrate": self.calibrate, "recipe": self.recipe}
        found = {key: Path(text).expanduser() for key, text in paths.items() if text is not None}
        changes: dict[str, Any] = {key: str(path.absolute()) for key, path in found.items() if path.exists()}
        return replace(self, **changes)

    def noted(self) -> Request:
        """The same as it is written down: without what is secret in an address."""
        found = self.anywhere()
        return replace(found, source=without_secrets(found.source)) if is_url(found.source) else found

    def prepare(self, token: str | None = None, download: bool = True) -> Job:
        """Open the source and settle what can be known from headers; `token` is the hub's.

        Without `download`, weights of the hub that are not here are not fetched. Raises RecipeError, SourceError,
        OutputError.
        """
        recipe, text = load_recipe(self.recipe, self.threshold), self._text()
        stream = self.stream or (False if download else None)
        checkpoint = open_checkpoint(self.source, revision=self.revision, token=token, stream=stream)
        plan = make_plan(checkpoint, recipe, self.output, self.max_shard_size)
        if plan.format.is_folder and isinstance(checkpoint.origin, GgufCheckpoint):
            checkpoint.origin.require_tokenizer()  # before hours of work: its files are written last
        if self.smooth is not None:
            from quantize8.model.smoothing import check_smoothable

            check_smoothable(checkpoint)
        if self.scale == MSE:
            if not plan.quantized:
                raise OutputError(f"scale {MSE}: {checkpoint.name} is int8 already, with its scales; leave it out")
            plan.searches = {name: ScaleSearch() for name in plan.quantized}
        return Job(self, plan, {} if text is None else self._calibration(text), text)

    def command(self, out: Path | Store) -> str:
        """The command line that asks for this."""
        source = str(Path(self.source).absolute()) if Path(self.source).exists() else self.source
        words = ["quantize8", "convert", source, "--out", str(out)]
        for each in fields(self)[1:]:
            value = getattr(self, each.name)
            if value is True:
                words.append(f"--{each.name}")
            elif value != each.default:
                words += [f"--{each.name.replace('_', '-')}", str(value)]
        return shlex.join(words)

    def _text(self) -> str | None:
        if self.calibrate is None:
            return None
        require("for --calibrate")
        from quantize8.model.text import read_text

        return read_text(Path(self.calibrate))

    def _calibration(self, text: str) -> dict[str, Any]:
        from quantize8.model.calibration import DEFAULT_TOKENS

        columns = "auto" if self.columns is None else self.columns
        asked: dict[str, Any] = {"outlier_columns": columns, "smooth": self.smooth}
        return {"text_blake3": digest(text.encode()), "tokens": DEFAULT_TOKENS, **asked}


@dataclass
class Job:
    """A request beside its source. The plan is from headers; `measure` brings in what a text decides."""

    request: Request
    plan: Plan
    calibration: dict[str, Any]  # what the manifest says of it; {} where nothing is calibrated
    text: str | None = None  # to calibrate with

    @property
    def default_out(self) -> Path:
        """Where the artifact goes if nobody says."""
        return Path(f"{self.plan.checkpoint.name}-{self.plan.format.suffix}")

    @property
    def units(self) -> list[Unit]:
        """The weight files, each of which a process can write by itself."""
        return units(self.plan)

    def read_bytes(self, unit: Unit) -> int:
        """Bytes of the source that are read for a weight file, quantized ones decoded."""
        tensors = self.plan.checkpoint.tensors
        return sum(tensors[name].nbytes for name in unit.sources if name in tensors)

    def decisions(self) -> dict[str, Any]:
        """What decides the bytes, as JSON has it: two jobs with the same decisions make the same artifact."""
        plan, checkpoint = self.plan, self.plan.checkpoint
        layout = "".join(f"{shard.file} {digest(shard.header)} {shard.nbytes}\n" for shard in plan.shards)
        config = json.dumps(checkpoint.config, sort_keys=True, default=str)
        source = {**checkpoint.identity, "config": digest(config.encode()), "files": checkpoint.fingerprint()}
        return {
            "version": __version__,
            "source": source,
            "format": asdict(plan.format),
            "recipe": plan.recipe.as_json(),
            "scale": self.request.scale,
            "calibration": self.calibration,
            "layout": digest(layout.encode()),
        }


def job_of(heading: dict[str, Any], out: Path | Store, token: str | None = None) -> Job:
    """The job that a journal's heading is of, without the text and the recipe's file: what they said is in it.

    Raises OutputError for a heading of another version, and what opening the source does.
    """
    try:
        request, decisions = Request(**heading["request"]), heading["decisions"]
        revision = decisions["source"].get("revision", request.revision)
        recipe = Recipe(**{**decisions["recipe"], "skip": tuple(decisions["recipe"]["skip"])})
        known = fits(request, Request) and fits(recipe, Recipe) and fits(revision, str | None)
    except (KeyError, TypeError, ValueError, AttributeError):
        known = False
    if not known or not fits(decisions.get("calibration"), dict[str, Any]):
        raise OutputError(
            f"{out}: its parts are not of quantize8 {__version__}; end it with their version, or start over by "
            "convert with --overwrite"
        )
    checkpoint = open_checkpoint(request.source, revision=revision, token=token, stream=request.stream)
    plan = make_plan(checkpoint, recipe, request.output, request.max_shard_size)
    if request.scale == MSE:
        plan.searches = {name: ScaleSearch() for name in plan.quantized}
    return Job(request, plan, decisions["calibration"])
