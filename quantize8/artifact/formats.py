"""The output formats by name."""

from __future__ import annotations

from typing import get_args

from quantize8.artifact.bitsandbytes import BitsAndBytes
from quantize8.artifact.compressed_tensors import CompressedTensors, MoeLoader, Scheme
from quantize8.artifact.floating import Floating
from quantize8.artifact.format import Format
from quantize8.checkpoint.base import FLOAT_NAMES
from quantize8.errors import OutputError

DEFAULT_FORMAT = "bitsandbytes"
FORMATS = (DEFAULT_FORMAT, "compressed-tensors", "gguf", *FLOAT_NAMES)


def make_format(name: str, scheme: str | None = None, moe: str | None = None) -> Format:
    """The format of a `--format`, with the `--scheme` and `--moe` of compressed-tensors.

    Raises OutputError for a name that is not one of them, and for an option that the format does not have.
    """
    options = {"scheme": (scheme, get_args(Scheme)), "moe": (moe, get_args(MoeLoader))}
    for option, (value, known) in options.items():
        if value is not None and value not in known:
            raise OutputError(f"{option} {value}: unknown; name one of {', '.join(known)}")
        if value is not None and name != "compressed-tensors":
            raise OutputError(f"{option} {value}: belongs to --format compressed-tensors; leave it out, or name that")
    if name == "compressed-tensors":
        given = {option: value for option, (value, _) in options.items() if value is not None}
        return CompressedTensors(suffix=scheme or "w8a8", **given)  # type: ignore[arg-type]
    if name == DEFAULT_FORMAT:
        return BitsAndBytes()
    if name == "gguf":
        from quantize8.artifact.gguf_format import Gguf  # its package takes a while to import

        return Gguf()
    if name in FORMATS:
        return Floating(name, name)
    raise OutputError(f"format {name}: unknown; name one of {', '.join(FORMATS)}")
