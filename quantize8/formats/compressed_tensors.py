"""The compressed-tensors format, which vLLM, SGLang, transformers and llama.cpp's converter open.

w8a8: codes as they are, and activations quantized by token at run time (`int-quantized`). w8a16: codes packed into
words, activations in floating point (`pack-quantized`). Experts are stored one by one, as checkpoints have them.
transformers joins experts into one tensor, and can only do that with packed ones.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from quantize8.formats import COMPRESSED_TENSORS, MoeLoader, Scheme
from quantize8.formats.base import Int8Format, OutTensor, in_float
from quantize8.kernels.reference import Array, scale_of
from quantize8.sources.compressed_tensors import PACKED, SCALE, SHAPE
from quantize8.sources.structure import CONV1D, EXPERT, Structure

if TYPE_CHECKING:
    from quantize8.conversion.plan import Plan

_OFFSET = 128  # added to codes, so that packed ones are unsigned
_WORD = 4  # codes in an int32
# vLLM multiplies by these at once, and wants one scheme for them; q_a and kv_a are multi-head latent attention's
_FUSED = re.compile(r"(?P<qkv>[qkv]_proj)$|(?P<gate_up>(?:gate|up)_proj)$|(?P<qkv_a>q_a_proj|kv_a_proj_with_mqa)$")
_GATE = ".shared_expert_gate"  # of Qwen's experts, N = 1: built without a quantization by vLLM


@dataclass(frozen=True)
class CompressedTensors(Int8Format):
    """One scale per row in either scheme; `moe` names the loader that the experts are laid out for."""

    name: str = COMPRESSED_TENSORS
    suffix: str = "w8a8"
    scheme: Scheme = "w8a8"
    moe: MoeLoader = "vllm"

    @property
    def title(self) -> str:
        """See `Format.title`."""
        return f"{self.name} {self.scheme}"

    def linears(self, structure: Structure) -> tuple[dict[str, str], dict[str, str]]:
        """See `Int8Format.linears`."""
        modules: dict[str, str] = {}
        refused: dict[str, str] = {}
        for name, kind in structure.linears.items():
            if kind == CONV1D:
                refused[name] = "a Conv1D, which this format's loaders do not quantize"
            elif name.endswith(_GATE):
                refused[name] = "a gate that vLLM has in floating point"
            elif self.scheme == "w8a16" and name in structure.read_on_loading:
                refused[name] = (
                    "read by transformers while it loads the model, which packed codes cannot be (those of w8a8 can)"
                )
            else:
                modules[name] = kind
        return modules | dict.fromkeys(structure.experts, EXPERT), refused

    def misfits(self, modules: Mapping[str, str], structure: Structure) -> Mapping[str, str]:
        """Modules that vLLM joins with one that stays in floating point."""
        groups: dict[str, list[str]] = {}
        for name in (*structure.linears, *structure.experts):
            if match := _FUSED.search(name):
                groups.setdefault(f"{name[: match.start()]}{match.lastgroup}", []).append(name)
        split = [names for names in groups.values() if not modules.keys() >= set(names)]
        alone = [name for names in split for name in names if name in modules]
        return dict.fromkeys(alone, "vLLM joins it with one in floating point")

    def module_tensors(self, module: str, shape: tuple[int, int], kind: str) -> list[OutTensor]:
        """See `Int8Format.module_tensors`."""
        rows, columns = shape
        scale = OutTensor(f"{module}.{SCALE}", "F32", (rows, 1))
        if not self._packs(kind):
            return [OutTensor(f"{module}.weight", "I8", shape), scale]
        words = -(-columns // _WORD)
        return [
            OutTensor(f"{module}.{PACKED}", "I32", (rows, words)),
            scale,
            OutTensor(f"{module}.{SHAPE}", "I64", (2,)),
        ]

    def pack(self, codes: Array, kind: str) -> Array:
        """See `Int8Format.pack`: four codes a word, the first lowest."""
        if not self._packs(kind):
            return codes
        rows, columns = codes.shape
        octets = np.zeros((rows, -(-columns // _WORD) * _WORD), np.uint8)
        np.add(codes.view(np.uint8), np.uint8(_OFFSET), out=octets[:, :columns])  # modulo 256: -127 becomes 1
        return octets.view("<i4")

    def scales(self, absmax: Array, shape: tuple[int, int], kind: str) -> list[Array]:
        """See `Int8Format.scales`."""
        scale = scale_of(absmax)[:, None]
        return [scale, np.array(shape, np.int64)] if self._packs(kind) else [scale]

    def edit_config(self, config: dict[str, Any], plan: Plan) -> dict[str, Any]:
        """See `Format.edit_config`."""
        kinds = {kind == EXPERT for kind in plan.modules.values()}
        mixed = len({self._packs(kind) for kind in plan.modules.values()}) == 2
        groups = {"group_0": self._group(["Linear"], packed=all(self._packs(kind) for kind in plan.modules.values()))}
        if mixed:  # transformers matches the first group whose target fits, so that the narrow one comes first
            groups = {"group_0": self._group([r"re:.*\.experts\..*"], packed=True), "group_1": self._group(["Linear"])}
        routers = [r"re:.*\.gate$"] if True in kinds else []  # vLLM's router is a layer, and transformers' none
        entry = {
            "quant_method": COMPRESSED_TENSORS,
            "format": "mixed-precision" if mixed else groups["group_0"]["format"],
            "quantization_status": "compressed",  # with any other, codes are read as floats
            "ignore": sorted({*in_float(plan)}) + routers,
            "kv_cache_scheme": None,
            "config_groups": groups,
        }
        return {**config, "quantization_config": entry}

    def _packs(self, kind: str) -> bool:
        return self.scheme == "w8a16" or (kind == EXPERT and self.moe == "transformers")

    def _group(self, targets: list[str], packed: bool = False) -> dict[str, Any]:
        shared = {"num_bits": 8, "type": "int", "symmetric": True, "group_size": None}
        return {
            "targets": targets,
            "format": "pack-quantized" if packed else "int-quantized",
            "weights": {**shared, "strategy": "channel", "dynamic": False},
            "input_activations": None if packed else {**shared, "strategy": "token", "dynamic": True},
            "output_activations": None,
        }
