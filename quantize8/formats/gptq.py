"""Reads GPTQ checkpoints of AutoGPTQ, GPTQModel and AutoRound: integers packed along the in features.

The layout is that of GPTQModel 7.7 (`nn_modules/qlinear`): qweight int32 [K * bits / 32, N], qzeros int32
[G, N * bits / 32], scales float16 [G, N], and g_idx int32 [K], the group of each in feature. Numbers are packed from
the lowest bits up; 3-bit numbers cross word boundaries. N is padded to whole words.

checkpoint_format "gptq", the default, stores each zero point minus one; "gptq_v2" stores it unchanged. For 2, 4 and 8
bits, GPTQModel subtracts the ones from whole words, so a zero point of 0 borrows from its neighbor; on loading it adds
them to whole words, and so does this reader. AutoRound never stores a zero point of 0; AutoGPTQ does, and thereby
corrupts the rest of its word.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from quantize8.errors import SourceError
from quantize8.formats.encoding import Encoding, require, unpack_int32
from quantize8.formats.grouped import (
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
from quantize8.kernels.reference import Array
from quantize8.sources.base import Checkpoint

METHOD = "gptq"
_BITS = (4, 8, 3, 2)  # for 5, 6 and 7 bits, packers use different layouts
_MINUS_ONE, _AS_IS = "gptq", "gptq_v2"
_GROUP_SIZE = 128  # if config.json does not say
_UNIT = 32  # so many numbers of any width fill whole words
_EMBEDDINGS = ("embed_tokens", "wte", "word_embeddings", "embed_in")  # packed along the vocabulary


@dataclass
class _Gptq(Grouped):
    bits: int = 4
    minus_one: bool = True  # whether zero points are stored minus one

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
    """Find the modules with a qweight; the lists of modules in config.json are not consulted.

    Args:
        stored: The checkpoint as it is stored.
        entry: The quantization_config of its config.json.

    Returns:
        The encoding of each module, by module name.

    Raises:
        SourceError: The layout is neither gptq nor gptq_v2, the bits are not 2, 3, 4 or 8, an embedding is quantized,
            or the tensors of a module do not fit together or contradict group_size, desc_act or sym of config.json.
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
    overrides = entry.get("dynamic") or {}  # GPTQModel: name pattern -> settings; shapes show which apply
    if not isinstance(overrides, dict):
        raise SourceError(
            f"{where}: its quantization_config has dynamic settings that are not a JSON object; "
            "use the original checkpoint"
        )
    settings = [entry, *({**entry, **other} for other in overrides.values() if isinstance(other, dict) and other)]
    for candidate in settings:
        require(candidate, {"bits": _BITS}, where)
        group_size_of(candidate, _GROUP_SIZE, where)
    return {module: _module(stored, module, names, settings) for module, names in modules(stored).items()}


def _module(stored: Checkpoint, module: str, names: tuple[str, ...], settings: list[dict[str, Any]]) -> Encoding:
    """Read a module with the first settings that fit it. If none fit, raise the error of the config's own settings."""
    errors = []
    for candidate in settings:
        try:
            return _read(stored, module, names, candidate)
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
            raise encoding.refuse(
                f"has {ORDER} {list(length)}, which does not fit {words} words of {bits}-bit integers"
            )
    if 32 % bits and (columns % _UNIT or rows % _UNIT):
        raise encoding.refuse(f"is {rows}x{columns} of {bits}-bit integers, whose sides are not multiples of {_UNIT}")
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
    """Check g_idx, and use it if desc_act is set and the groups are not consecutive."""
    name = f"{encoding.module}.{ORDER}"
    if name not in encoding.tensors:
        if reordered and groups > 1:
            raise encoding.refuse(f"has no {ORDER}, but config.json says desc_act")
        return
    encoding.check(ORDER, ("I32", "I64"), (encoding.shape[1],))
    order = encoding.whole(name)
    if order.min() < 0 or order.max() >= groups or not np.bincount(order, minlength=groups).all():
        raise encoding.refuse(f"has a {ORDER} that does not use exactly each of its {groups} groups")
    if not np.array_equal(order, encoding.group_of()):
        if not reordered:
            raise encoding.refuse(f"has a {ORDER} out of order, but config.json does not say desc_act")
        encoding.group_size = 0


def _read_symmetric(encoding: _Gptq) -> None:
    """Check that zero points are 2^(bits - 1), as sym requires.

    Some packers store that value in the format "gptq" without subtracting one. Kernels for symmetric weights ignore
    zero points, so the mistake goes unnoticed there; it is accepted here.
    """
    rows, middle = encoding.shape[0], 2 ** (encoding.bits - 1)
    if (encoding.zero_points(0, rows) == middle).all():
        return
    encoding.minus_one = False
    if (encoding.zero_points(0, rows) != middle).any():
        raise encoding.refuse(f"has zero points other than {middle}, but config.json says sym")
