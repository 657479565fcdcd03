"""Commands that write and check artifacts."""

from __future__ import annotations

from typing import Annotated

import typer

from quantize8.cli.options import Json, Page, Private, Revision, Token
from quantize8.cli.terminal import progress_bar, show


def convert(
    source: Annotated[str, typer.Argument(help="Hub id, folder, .safetensors, .bin or .gguf file, or s3://...")],
    out: Annotated[str | None, typer.Option(help="New folder, or s3://...  [default: <name>-int8]")] = None,
    format: Annotated[
        str, typer.Option(help="bitsandbytes, compressed-tensors, gguf, float16, bfloat16 or float32.")
    ] = "bitsandbytes",
    scheme: Annotated[str | None, typer.Option(help="Of compressed-tensors: w8a8 or w8a16.  [default: w8a8]")] = None,
    moe: Annotated[str | None, typer.Option(help="Its experts are for vllm or transformers.  [default: vllm]")] = None,
    threshold: Annotated[
        float | None, typer.Option(help="Outlier threshold, 0 for none.  [default: the recipe's]")
    ] = None,
    calibrate: Annotated[str | None, typer.Option(help="Text file to choose and store outlier columns by.")] = None,
    outlier_columns: Annotated[str, typer.Option(help="auto, or how many of each weight.")] = "auto",
    smooth: Annotated[float | None, typer.Option(help="SmoothQuant's alpha, by that text: 0.5.")] = None,
    recipe: Annotated[str, typer.Option(help="llm-int8, int8, int8-all, or a .toml file.")] = "llm-int8",
    scale: Annotated[str, typer.Option(help="absmax, or mse: the one with the least squared error.")] = "absmax",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    max_shard_size: Annotated[str, typer.Option(help="Largest weight file.")] = "5GB",
    workers: Annotated[int | None, typer.Option(help="Threads.  [default: one a processor]")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and convert nothing.")] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an artifact at --out; start an unfinished one over.")
    ] = False,
    part: Annotated[str | None, typer.Option(help="Write a share of the weight files: 2/4, or auto.")] = None,
    engine: Annotated[str, typer.Option(help="local, or ray: the nodes of a Ray cluster.")] = "local",
    address: Annotated[
        str | None, typer.Option(help="Of that cluster, or auto.  [default: one on this machine]")
    ] = None,
    stream: Annotated[bool, typer.Option("--stream", help="Read the weights remotely, store none.")] = False,
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
            max_shard_size=max_shard_size, workers=workers, dry_run=dry_run, overwrite=overwrite,
            part=part, engine=engine, address=address, stream=stream, push_to_hub=push_to_hub, private=private,
            revision=revision, token=token, progress=progress,
        )  # fmt: skip
    show(result, report.conversion(result), as_json)
    build.write(page, result, source)


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
