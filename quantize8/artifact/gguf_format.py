"""The format gguf as a conversion sees it: one file, planned by `gguf`, every matrix in Q8_0."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from quantize8.artifact import gguf
from quantize8.artifact.format import Format
from quantize8.artifact.gguf_tokenizer import tokenizer_fields
from quantize8.artifact.layout import OutTensor, Shard
from quantize8.checkpoint.gguf import GgufCheckpoint
from quantize8.ops.q8_0 import Q8_0

if TYPE_CHECKING:
    from quantize8.artifact.plan import Plan


@dataclass(frozen=True)
class Gguf(Format):
    """No rows of int8 codes, so no modules; tensors have llama.cpp's names, and the settings are in the file."""

    name: str = gguf.NAME
    suffix: str = gguf.NAME

    @property
    def is_folder(self) -> bool:
        """See `Format.is_folder`."""
        return False

    def lay_out(self, plan: Plan, max_shard_size: str) -> None:
        """See `Format.lay_out`: one file whatever its size, as llama.cpp reads one."""
        checkpoint = plan.checkpoint
        config, where = checkpoint.config, checkpoint.name
        tensors = gguf.plan(config, {name: info.shape for name, info in checkpoint.tensors.items()}, where)
        if isinstance(checkpoint, GgufCheckpoint):
            fields = gguf.carried(checkpoint.header)
        else:
            fields = [*gguf.settings(config, where, where), *tokenizer_fields(checkpoint.folder, config)]
        header = gguf.header(gguf.architecture(config, where), fields, tensors)
        outputs = {tensor.name: OutTensor(tensor.name, tensor.kind, tensor.shape) for tensor in tensors}
        plan.gguf = {tensor.source or tensor.name: tensor for tensor in tensors}
        plan.outputs = {name: [outputs[tensor.name]] for name, tensor in plan.gguf.items()}
        file = f"{checkpoint.name}-{Q8_0}.gguf"
        plan.shards = [Shard(file, [*outputs.values()], header.content, header.offsets, header.nbytes)]

    def edit_config(self, config: dict[str, Any], plan: Plan) -> dict[str, Any]:
        """Not called: the file holds the settings."""
        raise NotImplementedError(self.name)
