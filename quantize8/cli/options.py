"""Options that several commands have."""

from __future__ import annotations

from enum import Enum
from typing import Annotated

import typer


class OutlierMode(str, Enum):
    """Values of --mode."""

    hybrid = "hybrid"
    static = "static"
    dynamic = "dynamic"
    elementwise = "elementwise"
    bitsandbytes = "bitsandbytes"


Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Page = Annotated[
    str | None,
    typer.Option("--report", metavar="FILE.html", help="Write a web page with plots too; a page there is replaced."),
]
Mode = Annotated[
    OutlierMode | None,
    typer.Option(help="What is corrected for outliers.  [default: hybrid where calibrated, else dynamic]"),
]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub model.")]
Token = Annotated[
    str | None,
    typer.Option(help="Hub token (default: the one of `hf auth login`).", envvar="HF_TOKEN", show_envvar=True),
]
Private = Annotated[bool, typer.Option("--private", help="A model that is made on the hub is private.")]
