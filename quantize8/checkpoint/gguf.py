"""GGUF files of the Llama and Qwen families, read with llama.cpp's own package and named as transformers names them.

llama.cpp stores Llama's query and key rows interleaved for its rotary embedding; `rows` undoes that. Blocks are
dequantized as they are read, to float16 (or bfloat16 where the file holds that).
"""

from __future__ import annotations

import re
from functools import cached_property
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from quantize8.checkpoint.base import DTYPES, Checkpoint, TensorInfo, check_settings
from quantize8.checkpoint.gguf_header import check_header
from quantize8.checkpoint.guard import guarded
from quantize8.errors import SourceError, first_line
from quantize8.ops.reference import Array

_ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
_PERMUTED = {"llama"}  # the architectures whose q and k rows llama.cpp interleaves
_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_BLOCKS = re.compile(r"Q([45]_[01]|8_0)|Q[2-6]_K|TQ[12]_0|(MX|NV)FP4|IQ[1-4]_\w+")  # what the package dequantizes
_LAYER = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}


class GgufCheckpoint(Checkpoint):
    """One GGUF file. Its config and tokenizer are made by transformers from the file's own metadata."""

    def __init__(self, path: Path, identity: dict[str, str], name: str) -> None:
        super().__init__(path.parent, name, identity)
        self.path = path
        try:
            from gguf import GGUFReader

            check_header(path)
            reader = self.reader = GGUFReader(path)
            architecture = str(reader.fields["general.architecture"].contents())
            heads = {
                "attn_q": reader.fields.get(f"{architecture}.attention.head_count"),
                "attn_k": reader.fields.get(f"{architecture}.attention.head_count_kv"),
            }
            heads["attn_k"] = heads["attn_k"] or heads["attn_q"]  # as llama.cpp takes it
            self._heads = {kind: int(field.contents()) for kind, field in heads.items() if field is not None}
        except (ValueError, KeyError, IndexError, OSError, TypeError, OverflowError, MemoryError) as error:
            raise SourceError(f"{path}: not a whole GGUF file ({error}); fetch it again") from None
        if architecture not in _ARCHITECTURES:
            known = ", ".join(_ARCHITECTURES)
            raise SourceError(
                f"{path}: architecture {architecture!r} is not read from GGUF (only {known}); use safetensors"
            )
        self.architecture = architecture
        self._stored = {self._hf_name(tensor.name): tensor for tensor in reader.tensors}
        kinds = {tensor.tensor_type.name for tensor in reader.tensors}
        self.dtype = "BF16" if "BF16" in kinds else "F16"
        if sum(tensor.n_bytes for tensor in reader.tensors) > reader.data.nbytes:
            raise SourceError(f"{path}: its tensors lie over each other; fetch it again")
        for hf_name, tensor in self._stored.items():
            shape = tuple(int(size) for size in reversed(tensor.shape))
            self.tensors[hf_name] = TensorInfo(hf_name, self.dtype, shape, path.name)
            self._check(hf_name, shape, tensor.tensor_type)

    def rows(self, name: str, start: int, stop: int) -> Array:
        """See `Checkpoint.rows`."""
        from gguf import GGMLQuantizationType, dequantize

        tensor = self._stored[name]
        order, data = self._row_order(name), tensor.data
        if tensor.tensor_type == GGMLQuantizationType.BF16:  # given as bytes
            data = data.view(ml_dtypes.bfloat16)
        stored = data[start:stop] if order is None else data[order[start:stop]]
        if tensor.tensor_type == GGMLQuantizationType.BF16:
            return np.ascontiguousarray(stored)
        values = dequantize(stored, tensor.tensor_type)
        return np.ascontiguousarray(values.astype(DTYPES[self.dtype]))

    @cached_property
    def _config(self) -> dict[str, Any]:
        from transformers import AutoConfig

        try:
            with guarded():
                config = AutoConfig.from_pretrained(self.folder, gguf_file=self.path.name).to_dict()
        except Exception as error:  # what transformers makes of damaged settings is of any kind
            raise SourceError(f"{self.path}: transformers cannot read its settings ({first_line(error)})") from None
        check_settings(config, self.path)
        config["architectures"] = [_ARCHITECTURES[self.architecture]]
        config["dtype"] = {"F16": "float16", "BF16": "bfloat16"}[self.dtype]
        config["tie_word_embeddings"] = "lm_head.weight" not in self.tensors
        return {key: value for key, value in config.items() if not key.startswith("_")}

    @property
    def config(self) -> dict[str, Any]:
        """config.json as transformers derives it from the file's metadata."""
        return dict(self._config)

    @property
    def tokenizer(self) -> Any:
        """The tokenizer as transformers derives it from the file's metadata."""
        from transformers import AutoTokenizer

        try:
            with guarded():
                return AutoTokenizer.from_pretrained(self.folder, gguf_file=self.path.name)
        except Exception as error:  # as above
            raise SourceError(f"{self.path}: transformers cannot read its tokenizer ({first_line(error)})") from None

    def write_companions(self, folder: Path) -> None:
        """Write the tokenizer's files."""
        self.tokenizer.save_pretrained(folder)

    def _check(self, name: str, shape: tuple[int, ...], kind: Any) -> None:
        """Raise SourceError for a tensor whose rows cannot be read as they are stored."""
        heads = self._heads_of(name)
        if heads is not None and (heads <= 0 or shape[0] % (2 * heads)):
            raise SourceError(f"{self.path}: {name} has {shape[0]} rows, not pairs for {heads} heads; fetch it again")
        blocked = kind.name not in ("F32", "F16", "BF16")
        if blocked and (not _BLOCKS.fullmatch(kind.name) or len(shape) < 2 or 0 in shape):
            raise SourceError(
                f"{self.path}: {name} {list(shape)} is stored as {kind.name}, which is not read; use safetensors"
            )

    def _hf_name(self, name: str) -> str:
        if match := re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name):
            layer, kind, end = match.groups()
            if kind in _LAYER:
                return f"model.layers.{layer}.{_LAYER[kind]}.{end}"
        elif match := re.fullmatch(r"(\w+)\.weight", name):
            if match[1] in _TOP:
                return f"{_TOP[match[1]]}.weight"
            if match[1] == "rope_freqs":
                raise SourceError(
                    f"{self.path}: its rotary scaling (rope_freqs) cannot be told exactly from GGUF; use safetensors"
                )
        raise SourceError(
            f"{self.path}: tensor {name} is unknown for {self.architecture}; use a safetensors checkpoint"
        )

    def _row_order(self, name: str) -> Array | None:
        """Where each row of a Llama query or key weight stands in the file; None where rows are in place."""
        heads = self._heads_of(name)
        if heads is None:
            return None
        count = self.tensors[name].shape[0]
        order: Array = np.arange(count).reshape(heads, -1, 2).swapaxes(1, 2).ravel()
        return order

    def _heads_of(self, name: str) -> int | None:
        """Heads of a Llama query or key weight, 0 where the file does not say; None for what is not interleaved."""
        kind = {"q_proj": "attn_q", "k_proj": "attn_k"}.get(name.split(".")[-2])
        return None if self.architecture not in _PERMUTED or kind is None else self._heads.get(kind, 0)
