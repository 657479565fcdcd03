"""The tokenizer that transformers makes of a GGUF file, built from the header that `gguf_header` has read.

transformers itself would parse the file three times, hold objects for every token, and import torch.
"""

from __future__ import annotations

from typing import Any

from quantize8 import limits
from quantize8.errors import SourceError, first_line
from quantize8.formats.gguf.header import Header
from quantize8.optional import require
from quantize8.sources.guard import guarded

TOKENS = "tokenizer.ggml.tokens"
_CLASSES = {
    "llama": "TokenizersBackend",
    "qwen2": "Qwen2Tokenizer",
    "qwen3": "Qwen2Tokenizer",
    "qwen2moe": "Qwen2Tokenizer",
    "qwen3moe": "Qwen2Tokenizer",
    "gemma2": "GemmaTokenizer",
    "gemma3": "GemmaTokenizer",
    "phi3": "TokenizersBackend",
    "gpt-oss": "TokenizersBackend",
}  # the classes that AutoTokenizer chooses
_TYPES = {"Qwen2Tokenizer": "gpt2", "GemmaTokenizer": "llama"}  # class -> the only type of tokenizer that it is
_SPECIAL = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}  # transformers' names -> llama.cpp's


class _Given:
    """A wrapper that stops transformers from copying the tokenizer: its deep copy is the tokenizer itself."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return self._tokenizer


def require_tokenizer(header: Header) -> None:
    """Raise DependencyError where `read_tokenizer` lacks what it needs."""
    if TOKENS in header.entries:
        require(f"to read the tokenizer of {header.path}", "transformers", "torch")


def read_tokenizer(header: Header) -> Any:
    """Build the tokenizer that transformers makes of a file's metadata.

    Args:
        header: The header with the metadata.

    Returns:
        A tokenizer of transformers, None if the file has no tokens.

    Raises:
        SourceError: transformers cannot build the tokenizer.
        DependencyError: transformers is not installed.
    """
    require_tokenizer(header)
    if TOKENS not in header.entries:
        return None
    try:
        with guarded():
            return _build(header)
    except SourceError:
        raise
    except Exception as error:  # damaged metadata can make transformers raise anything
        raise SourceError(
            f"{header.path}: transformers cannot read its tokenizer ({first_line(error)}); fetch it again"
        ) from None


def _build(header: Header) -> Any:
    """Do what transformers' `TokenizersBackend` does when it is given a gguf_file."""
    import transformers
    from transformers.integrations.gguf import GGUF_TOKENIZER_MAPPING, convert_gguf_tokenizer

    fields, settings = (
        {ours: header.value(f"tokenizer.{key}") for key, ours in names.items() if f"tokenizer.{key}" in header.entries}
        for names in GGUF_TOKENIZER_MAPPING.values()
    )
    model, name = fields.get("tokenizer_type"), _CLASSES[header.architecture]
    if model != _TYPES.get(name, model):  # these classes take only tokens and merges from the file
        raise SourceError(
            f"{header.path}: transformers would open the {model!r} tokenizer of this {header.architecture} as another "
            "type; use a safetensors checkpoint"
        )
    if "merges" not in fields and sum(len(token) ** 2 for token in fields["tokens"]) > limits.TOKEN_SQUARES:
        raise SourceError(f"{header.path}: its tokens are too long to derive merges from them; fetch it again")
    if model == "llama":
        settings.setdefault("add_bos_token", True)  # llama.cpp's default
    for kind, key in _SPECIAL.items():
        number = header.value(f"tokenizer.ggml.{key}_token_id")
        settings[f"{kind}_token"] = None if number is None else fields["tokens"][number]
    tokenizer, _ = convert_gguf_tokenizer(header.architecture, fields)
    fields.clear()  # tokens and merges are in the tokenizer now
    return getattr(transformers, name)(tokenizer_object=_Given(tokenizer), **settings)
