"""Commands that write and check artifacts."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from quantize8.cli.options import Device, Json, Out, Page, Private, Token, Workers, with_convert_options
from quantize8.cli.terminal import progress_bar, show
from quantize8.errors import OutputError


@with_convert_options
def convert(
    out: Out = None,
    device: Device = "auto",
    workers: Workers = None,
    check: Annotated[
        bool | None,
        typer.Option(
            "--check/--no-check",
            help="Compare the artifact with its source.  [default: if that takes less time than converting]",
            show_default=False,
        ),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the plan without converting.")] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the artifact at --out, or restart an unfinished one.")
    ] = False,
    part: Annotated[str | None, typer.Option(help="Write only this share of the weight files: 2/4, or auto.")] = None,
    engine: Annotated[str, typer.Option(help="local, or ray to convert on a Ray cluster.")] = "local",
    address: Annotated[
        str | None, typer.Option(help="Ray cluster address (with --engine ray).  [default: a cluster on this machine]")
    ] = None,
    push_to_hub: Annotated[
        str | None, typer.Option(metavar="REPO", help="Upload the artifact to this model on the hub.")
    ] = None,
    private: Private = False,
    page: Page = None,
    token: Token = None,
    as_json: Json = False,
    **options: Any,
) -> None:
    """Convert a checkpoint to an int8 artifact that other loaders open directly, or dequantize one."""
    from quantize8 import reports
    from quantize8.commands.convert import convert as operation
    from quantize8.reports.pages import build

    build.check(page)
    with progress_bar("converting") as progress:
        result = operation(
            out=out, device=device, workers=workers, check=check, dry_run=dry_run, overwrite=overwrite, part=part,
            engine=engine, address=address, push_to_hub=push_to_hub, private=private, token=token, progress=progress,
            **options,
        )  # fmt: skip
    show(result, reports.conversion(result), as_json)
    build.write(page, result, options["source"])


@with_convert_options
def plan(
    out: Out = None,
    machines: Annotated[str, typer.Option(help="Numbers of machines to predict the time for.")] = "1,8,64",
    device: Device = "auto",
    workers: Workers = None,
    token: Token = None,
    as_json: Json = False,
    **options: Any,
) -> None:
    """Plan a conversion, and predict its time, memory and disk space."""
    from quantize8 import reports
    from quantize8.commands.plan import plan as operation

    result = operation(out=out, machines=_numbers(machines), device=device, workers=workers, token=token, **options)
    show(result, reports.conversion(result), as_json)


def finalize(
    out: Annotated[str, typer.Argument(help="The --out of convert --part: folder or address.")],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing artifact.")] = False,
    token: Token = None,
    as_json: Json = False,
) -> None:
    """Combine the weight files that convert --part wrote into an artifact."""
    from quantize8 import reports
    from quantize8.commands.finalize import finalize as operation

    result = operation(out, overwrite=overwrite, token=token)
    show(result, reports.conversion(result), as_json)


def verify(
    artifact: Annotated[str, typer.Argument(help="Folder that convert wrote.")],
    as_json: Json = False,
) -> None:
    """Check every byte of an artifact against its manifest."""
    from quantize8 import reports
    from quantize8.commands.verify import verify as operation

    result = operation(artifact)
    show(result, reports.verification(result), as_json)


def push(
    artifact: Annotated[str, typer.Argument(help="Folder that convert wrote.")],
    repo: Annotated[str, typer.Argument(help="Model on the hub, such as me/model; created if missing.")],
    private: Private = False,
    revision: Annotated[str | None, typer.Option(help="Branch of that model; created if missing.")] = None,
    token: Token = None,
    as_json: Json = False,
) -> None:
    """Upload an artifact to the Hugging Face hub, with a model card."""
    from quantize8.commands.push import push as operation

    result = operation(artifact, repo, private=private, revision=revision, token=token)
    show(
        result, f"{result.artifact}: {result.files} files, {result.nbytes / 1e6:,.1f} MB, now at {result.url}", as_json
    )


def _numbers(text: str) -> list[int]:
    try:
        return [int(word) for word in text.split(",")]
    except ValueError:
        raise OutputError(f"machines {text}: not a list of numbers; use for example 1,8,64") from None
