"""Options that several commands share, and those that commands derive from `ConvertOptions`."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import MISSING, fields
from typing import TYPE_CHECKING, Annotated, Any, TypeVar, get_type_hints

import typer

from quantize8.conversion.options import ConvertOptions

if TYPE_CHECKING:
    from quantize8.kernels.reference import OutlierMode
else:
    OutlierMode = str  # avoids importing NumPy here; `load` checks the value

_Command = TypeVar("_Command", bound=Callable[..., None])

Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Page = Annotated[
    str | None,
    typer.Option("--report", metavar="FILE.html", help="Also write an HTML report with plots; replaces the file."),
]
Mode = Annotated[
    OutlierMode | None,
    typer.Option(help="hybrid, dynamic or bitsandbytes.  [default: hybrid if calibrated, else dynamic]"),
]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub model.")]
Token = Annotated[
    str | None,
    typer.Option(help="Hub token (default: the one from `hf auth login`).", envvar="HF_TOKEN", show_envvar=True),
]
Out = Annotated[str | None, typer.Option(help="New folder, or s3://...  [default: <name>-int8]")]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
Workers = Annotated[int | None, typer.Option(help="Worker threads.  [default: CPU count]")]
Private = Annotated[bool, typer.Option("--private", help="If the model on the hub is new, make it private.")]


def with_convert_options(command: _Command) -> _Command:
    """Decorate a command whose signature ends with `**options`: add a parameter for each field of ConvertOptions.

    The source and the output come first, then the other added options, then the command's own.
    """
    own = inspect.signature(command, eval_str=True).parameters.values()
    first = [each.replace(kind=each.KEYWORD_ONLY) for each in own if each.name == "out"]
    rest = [
        each.replace(kind=each.KEYWORD_ONLY) for each in own if each.name != "out" and each.kind is not each.VAR_KEYWORD
    ]
    (source, *derived) = _derived()
    parameters = [source, *first, *derived, *rest]

    def call(**given: Any) -> None:
        command(**given)

    call.__name__, call.__doc__ = command.__name__, command.__doc__
    call.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    call.__annotations__ = {each.name: each.annotation for each in parameters}
    return call  # type: ignore[return-value]


def _derived() -> list[inspect.Parameter]:
    """A Typer parameter for each field of ConvertOptions: an argument if it has no default, otherwise an option."""
    kinds, parameters = get_type_hints(ConvertOptions), []
    for each in fields(ConvertOptions):
        about, required = each.metadata, each.default is MISSING
        names = [f"--{each.name.replace('_', '-')}"] if kinds[each.name] is bool else []
        show = "[default:" not in about["help"] and each.default is not None
        option = typer.Option(*names, help=about["help"], metavar=about["metavar"], show_default=show)
        shown = typer.Argument(help=about["help"]) if required else option
        parameters.append(
            inspect.Parameter(
                each.name,
                inspect.Parameter.KEYWORD_ONLY,
                default=inspect.Parameter.empty if required else each.default,
                annotation=Annotated[kinds[each.name], shown],
            )
        )
    return parameters
