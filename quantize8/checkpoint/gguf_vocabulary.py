"""The tokenizer of a GGUF file, as transformers makes it, from the header as we read it.

transformers would parse the whole file for each of its parts, and keep objects for every token.
"""

from __future__ import annotations

from typing import Any

from quantize8.checkpoint.gguf_header import Header
from quantize8.checkpoint.guard import guarded
from quantize8.errors import SourceError, first_line

TOKENS = "tokenizer.ggml.tokens"
_SPECIAL = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}  # transformers' names -> llama.cpp's


def read_tokenizer(header: Header, config: dict[str, Any]) -> Any:
    """The tokenizer that transformers makes of a file's metadata, None where the file has no tokens.

    Raises SourceError where transformers cannot make one.
    """
    if TOKENS not in header.entries:
        return None
    try:
        with guarded():
            return _build(header, config)
    except SourceError:
        raise
    except Exception as error:  # what transformers makes of damaged metadata is of any kind
        raise SourceError(f"{header.path}: transformers cannot read its tokenizer ({first_line(error)})") from None


def _build(header: Header, config: dict[str, Any]) -> Any:
    """As `TokenizersBackend` does with gguf_file; the class is the one that AutoTokenizer takes for the model."""
    from transformers import TokenizersBackend
    from transformers.integrations.gguf import GGUF_TOKENIZER_MAPPING, convert_gguf_tokenizer
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING

    fields, settings = (
        {ours: header.value(f"tokenizer.{key}") for key, ours in names.items() if f"tokenizer.{key}" in header.entries}
        for names in GGUF_TOKENIZER_MAPPING.values()
    )
    if fields.get("tokenizer_type") == "llama":
        settings.setdefault("add_bos_token", True)  # as llama.cpp takes it
    for name, key in _SPECIAL.items():
        number = header.value(f"tokenizer.ggml.{key}_token_id")
        settings[f"{name}_token"] = None if number is None else fields["tokens"][number]
    tokenizer, _ = convert_gguf_tokenizer(header.architecture, fields)
    kind = TOKENIZER_MAPPING.get(CONFIG_MAPPING[config["model_type"]], TokenizersBackend)
    return kind(tokenizer_object=tokenizer, **settings)
