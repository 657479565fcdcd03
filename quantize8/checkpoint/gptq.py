"""Reading GPTQ checkpoints of AutoGPTQ, GPTQModel and AutoRound: integers packed along the in features.

The layout is that of GPTQModel 7.7 (`nn_modules/qlinear`): qweight int32 [K * bits / 32, N], qzeros int32
[G, N * bits / 32], scales float16 [G, N], and g_idx int32 [K], the group of each in feature. Packed numbers follow each
other from the lowest bits on, those of 3 bits across the words; N is filled up to whole words.

checkpoint_format "gptq", the default, stores zero points minus one, "gptq_v2" as they are. GPTQModel takes the ones of
2, 4 and 8 bits from whole words, so that a zero point of 0 borrows from its neighbour, and adds them to whole words to
load; so does this reader. AutoRound stores no such zero point, and AutoGPTQ spoils the rest of its word.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from quantize8.checkpoint.base import Checkpoint
from quantize8.checkpoint.encoding import Encoding, require, unpack_int32
from quantize8.checkpoint.grouped import (
    ORDER,
    SCALE_TYPES,
    SCALES,
    WEIGHT,
    WORDS,
    ZEROS,
    Grouped,
    group_size_of,
    modules,
)
from quantize8.errors import SourceError
from quantize8.ops.reference import Array

METHOD = "gptq"
_BITS = (4, 8, 3, 2)  # 5, 6 and 7 bits are laid out in different ways by different packers
_MINUS_ONE, _AS_IS = "gptq", "gptq_v2"
_GROUP_SIZE = 128  # where config.json does not say
_UNIT = 32  # numbers of any width that fill whole words
_EMBEDDINGS = ("embed_tokens", "wte", "word_embeddings", "embed_in")  # packed along the vocabulary


@dataclass
class _Gptq(Grouped):
    bits: int = 4
    minus_one: bool = True  # whether zero points are stored less one

    def integers(self, start: int, stop: int) -> Array:
        words = self.whole(f"{self.module}.{WEIGHT}")[:, start:stop]
        return unpack_int32(words.T, self.bits)[:, : self.shape[1]]

    def zero_points(self, start: int, stop: int) -> Array:
        first, last = start // _UNIT, -(-stop // _UNIT)
        words = self.whole(f"{self.module}.{ZEROS}")[:, first * self.bits : last * self.bits].view(np.uint32)
        if self.minus_one and 32 % self.bits == 0:
            words = words + np.uint32(sum(1 << shift for shift in range(0, 32, self.bits)))
        zero = unpack_int32(words, self.bits)
        if self.minus_one and 32 % self.bits:
            zero = zero + np.uint8(1) & np.uint8(2**self.bits - 1)
        offset = first * _UNIT
        values: Array = zero[:, start - offset : stop - offset].T
        return values


def find(stored: Checkpoint, entry: dict[str, Any]) -> dict[str, Encoding]:
    """Module -> its encoding, for each module with a qweight; config.json's lists of modules are not asked.

    Raises SourceError for layouts other than gptq and gptq_v2, bits other than 2, 3, 4 and 8, quantized embeddings, and
    where the tensors of a module do not fit together or contradict config.json's group_size, desc_act or sym.
    """
    where = str(stored.folder)
    known = {
        "checkpoint_format": (None, _MINUS_ONE, _AS_IS),
        "format": (None, _MINUS_ONE, _AS_IS),
        "is_marlin_format": (False, None),
        "rotation": (None, ""),  # of the activations
        "pack_dtype": (None, "int32"),
    }
    require(entry, known, where)
    if entry.get("checkpoint_format") and entry.get("format") not in (None, entry["checkpoint_format"]):
        raise SourceError(f"{where}: its quantization_config names two formats; fetch config.json again")
    overrides = entry.get("dynamic") or {}  # GPTQModel: pattern of names -> other settings; shapes tell which hold
    if not isinstance(overrides, dict):
        raise SourceError(
            f"{where}: its quantization_config has dynamic settings that are no JSON object; use its original"
        )
    settings = [entry, *({**entry, **other} for other in overrides.values() if isinstance(other, dict) and other)]
    for one in settings:
        require(one, {"bits": _BITS}, where)
        group_size_of(one, _GROUP_SIZE, where)
    return {module: _module(stored, module, names, settings) for module, names in modules(stored).items()}


def _module(stored: Checkpoint, module: str, names: tuple[str, ...], settings: list[dict[str, Any]]) -> Encoding:
    """The module read by the first settings that fit it; the error is that of the config's own."""
    errors = []
    for one in settings:
        try:
            return _read(stored, module, names, one)
        except SourceError as error:
            errors.append(error)
    raise errors[0]


def _read(stored: Checkpoint, module: str, names: tuple[str, ...], settings: dict[str, Any]) -> Encoding:
    bits = int(settings.get("bits", _BITS[0]))  # JSON may have written 4.0
    form = settings.get("checkpoint_format") or settings.get("format") or _MINUS_ONE
    words, rows = stored.tensors[names[0]].shape
    has_order = f"{module}.{ORDER}" in names
    columns = words * 32 // bits
    encoding = _Gptq(stored, module, names, (rows, columns), bits=bits, minus_one=form == _MINUS_ONE)
    if module.rpartition(".")[2] in _EMBEDDINGS:
        raise encoding.refuse("is a quantized embedding, which is not read")
    if has_order:
        length = stored.tensors[f"{module}.{ORDER}"].shape
        columns = length[0] if len(length) == 1 else 0
        encoding.shape = (rows, columns)
        if not columns or -(-columns * bits // 32) != words:
            raise encoding.refuse(f"has {ORDER} {list(length)} that does not fit {words} words of {bits}-bit integers")
    if 32 % bits and (columns % _UNIT or rows % _UNIT):
        raise encoding.refuse(f"is {rows}x{columns} of {bits}-bit integers, whose sides are no multiples of {_UNIT}")
    size = group_size_of(settings, _GROUP_SIZE, str(stored.folder))
    size = columns if size == -1 else min(size, columns)
    groups = -(-columns // size)
    encoding.check(SCALES, SCALE_TYPES, (groups, rows))
    encoding.check(ZEROS, WORDS, (groups, -(-rows * bits // 32)))
    encoding.group_size = size
    _read_order(encoding, groups, bool(settings.get("desc_act")))
    if settings.get("sym") is True:
        _read_symmetric(encoding)
    encoding.release()
    return encoding


def _read_order(encoding: _Gptq, groups: int, reordered: bool) -> None:
    """Leave the order of the groups to g_idx where desc_act says so and it is another than the usual."""
    name = f"{encoding.module}.{ORDER}"
    if name not in encoding.tensors:
        if reordered and groups > 1:
            raise encoding.refuse(f"has no {ORDER}, and config.json says desc_act")
        return
    encoding.check(ORDER, ("I32", "I64"), (encoding.shape[1],))
    order = encoding.whole(name)
    if order.min() < 0 or order.max() >= groups or not np.bincount(order, minlength=groups).all():
        raise encoding.refuse(f"has {ORDER} that does not use each of its {groups} groups, and no other")
    if not np.array_equal(order, encoding.group_of()):
        if not reordered:
            raise encoding.refuse(f"has {ORDER} out of order, and config.json does not say desc_act")
        encoding.group_size = 0


def _read_symmetric(encoding: _Gptq) -> None:
    """Hold zero points to what sym says they are, 2^(bits - 1).

    Some packers store that under the format "gptq" without taking one from it: kernels for symmetric weights do not
    look at zero points, so nobody notices.
    """
    rows, middle = encoding.shape[0], 2 ** (encoding.bits - 1)
    if (encoding.zero_points(0, rows) == middle).all():
        return
    encoding.minus_one = False
    if (encoding.zero_points(0, rows) != middle).any():
        raise encoding.refuse(f"has other zero points than {middle}, and config.json says sym")
