"""Commands that write and check artifacts."""

from __future__ import annotations

from typing import Annotated

import typer

from quantize8.cli.options import (
    Device,
    Json,
    Moe,
    Out,
    OutputFormat,
    Page,
    Private,
    RecipeName,
    Revision,
    ScaleKind,
    Scheme,
    ShardSize,
    Source,
    Stream,
    Threshold,
    Token,
    Workers,
)  # fmt: skip
from quantize8.cli.terminal import progress_bar, show
from quantize8.errors import OutputError


def convert(
    source: Source,
    out: Out = None,
    format: OutputFormat = "bitsandbytes",
    scheme: Scheme = None,
    moe: Moe = None,
    threshold: Threshold = None,
    calibrate: Annotated[str | None, typer.Option(help="Text file to choose and store outlier columns by.")] = None,
    outlier_columns: Annotated[str, typer.Option(help="auto, or how many of each weight.")] = "auto",
    smooth: Annotated[float | None, typer.Option(help="SmoothQuant's alpha, by that text: 0.5.")] = None,
    recipe: RecipeName = "llm-int8",
    scale: ScaleKind = "absmax",
    device: Device = "auto",
    max_shard_size: ShardSize = "5GB",
    workers: Workers = None,
    check: Annotated[
        bool | None,
        typer.Option(
            "--check/--no-check",
            help="Compare the artifact with its source.  [default: where it costs less than converting]",
            show_default=False,
        ),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and convert nothing.")] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an artifact at --out; start an unfinished one over.")
    ] = False,
    part: Annotated[str | None, typer.Option(help="Write a share of the weight files: 2/4, or auto.")] = None,
    engine: Annotated[str, typer.Option(help="local, or ray: the nodes of a Ray cluster.")] = "local",
    address: Annotated[
        str | None, typer.Option(help="Of that cluster, or auto.  [default: one on this machine]")
    ] = None,
    stream: Stream = False,
    push_to_hub: Annotated[str | None, typer.Option(metavar="REPO", help="Upload the artifact to this model.")] = None,
    private: Private = False,
    page: Page = None,
    revision: Revision = None,
    token: Token = None,
    as_json: Json = False,
) -> None:
    """Write an int8 artifact that other loaders open as it is, or a plain one of a quantized source."""
    from quantize8 import report
    from quantize8.operations.convert import convert as operation
    from quantize8.page import build

    build.check(page)
    with progress_bar("converting") as progress:
        result = operation(
            source, out, format=format, scheme=scheme, moe=moe, threshold=threshold, calibrate=calibrate,
            outlier_columns=outlier_columns, smooth=smooth, recipe=recipe, scale=scale, device=device,
            max_shard_size=max_shard_size, workers=workers, check=check, dry_run=dry_run, overwrite=overwrite,
            part=part, engine=engine, address=address, stream=stream, push_to_hub=push_to_hub, private=private,
            revision=revision, token=token, progress=progress,
        )  # fmt: skip
    show(result, report.conversion(result), as_json)
    build.write(page, result, source)


def plan(
    source: Source,
    out: Out = None,
    machines: Annotated[str, typer.Option(help="Numbers of machines to share the work.")] = "1,8,64",
    format: OutputFormat = "bitsandbytes",
    scheme: Scheme = None,
    moe: Moe = None,
    threshold: Threshold = None,
    recipe: RecipeName = "llm-int8",
    scale: ScaleKind = "absmax",
    device: Device = "auto",
    max_shard_size: ShardSize = "5GB",
    workers: Workers = None,
    stream: Stream = False,
    revision: Revision = None,
    token: Token = None,
    as_json: Json = False,
) -> None:
    """Plan a conversion, and measure how long it will take, and the memory and disk it needs."""
    from quantize8 import report
    from quantize8.operations.plan import plan as operation

    result = operation(
        source, out, machines=_numbers(machines), format=format, scheme=scheme, moe=moe,
        threshold=threshold, recipe=recipe, scale=scale, device=device, max_shard_size=max_shard_size,
        workers=workers, stream=stream, revision=revision, token=token,
    )  # fmt: skip
    show(result, report.conversion(result), as_json)


def finalize(
    out: Annotated[str, typer.Argument(help="Folder or address that convert --part was given.")],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an artifact there.")] = False,
    token: Token = None,
    as_json: Json = False,
) -> None:
    """Make an artifact of the weight files that convert --part wrote."""
    from quantize8 import report
    from quantize8.operations.finalize import finalize as operation

    result = operation(out, overwrite=overwrite, token=token)
    show(result, report.conversion(result), as_json)


def verify(
    artifact: Annotated[str, typer.Argument(help="Folder that convert wrote.")],
    as_json: Json = False,
) -> None:
    """Check every byte of an artifact against its manifest."""
    from quantize8 import report
    from quantize8.operations.verify import verify as operation

    result = operation(artifact)
    show(result, report.verification(result), as_json)


def push(
    artifact: Annotated[str, typer.Argument(help="Folder that convert wrote.")],
    repo: Annotated[str, typer.Argument(help="Model on the hub, like me/model; made where there is none.")],
    private: Private = False,
    revision: Annotated[str | None, typer.Option(help="Branch of that model; made where there is none.")] = None,
    token: Token = None,
    as_json: Json = False,
) -> None:
    """Upload an artifact to the Hugging Face hub, with a model card."""
    from quantize8.operations.push import push as operation

    result = operation(artifact, repo, private=private, revision=revision, token=token)
    show(
        result, f"{result.artifact}: {result.files} files, {result.nbytes / 1e6:,.1f} MB, now at {result.url}", as_json
    )


def _numbers(text: str) -> list[int]:
    try:
        return [int(word) for word in text.split(",")]
    except ValueError:
        raise OutputError(f"machines {text}: not a list of numbers; write for example 1,8,64") from None
