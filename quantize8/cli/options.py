"""Options that several commands have."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from quantize8.ops.reference import OutlierMode
else:
    OutlierMode = str  # `load` refuses another word, without NumPy loaded for it here

Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Page = Annotated[
    str | None,
    typer.Option("--report", metavar="FILE.html", help="Write a web page with plots too; a page there is replaced."),
]
Mode = Annotated[
    OutlierMode | None,
    typer.Option(help="hybrid, dynamic or bitsandbytes.  [default: hybrid where calibrated, else dynamic]"),
]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub model.")]
Token = Annotated[
    str | None,
    typer.Option(help="Hub token (default: the one of `hf auth login`).", envvar="HF_TOKEN", show_envvar=True),
]
# What decides an artifact, of `convert` and `plan`
Source = Annotated[str, typer.Argument(help="Hub id, folder, .safetensors, .bin or .gguf file, or s3://...")]
Out = Annotated[str | None, typer.Option(help="New folder, or s3://...  [default: <name>-int8]")]
OutputFormat = Annotated[
    str, typer.Option(help="bitsandbytes, compressed-tensors, gguf, float16, bfloat16 or float32.")
]
Scheme = Annotated[str | None, typer.Option(help="Of compressed-tensors: w8a8 or w8a16.  [default: w8a8]")]
Moe = Annotated[str | None, typer.Option(help="Its experts are for vllm or transformers.  [default: vllm]")]
Threshold = Annotated[float | None, typer.Option(help="Outlier threshold, 0 for none.  [default: the recipe's]")]
RecipeName = Annotated[str, typer.Option(help="llm-int8, int8, int8-all, or a .toml file.")]
ScaleKind = Annotated[str, typer.Option(help="absmax, or mse: the one with the least squared error.")]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
ShardSize = Annotated[str, typer.Option(help="Largest weight file.")]
Workers = Annotated[int | None, typer.Option(help="Threads.  [default: one a processor]")]
Stream = Annotated[bool, typer.Option("--stream", help="Read the weights remotely, store none.")]
Private = Annotated[bool, typer.Option("--private", help="A model that is made on the hub is private.")]
