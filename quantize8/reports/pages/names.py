"""What a page reads from the names of tensors and modules: layer, module type, and part of the model."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

NORMS, ROUTERS, EXPERTS, ATTENTION = "norms", "routers", "experts", "attention"
EMBEDDINGS, HEAD, FEED_FORWARD, OTHER = "embeddings", "output head", "feed-forward", "other"
_PARTS = (  # the first pattern that matches decides
    (NORMS, re.compile(r"norm|(^|\.)ln_")),
    (ROUTERS, re.compile(r"router|(moe|mlp)\.gate(\.|$)|shared_expert_gate")),
    (EXPERTS, re.compile(r"expert")),
    (ATTENTION, re.compile(r"attn|attention")),
    (EMBEDDINGS, re.compile(r"embed|wte|wpe")),
    (HEAD, re.compile(r"(^|\.)\w*head(\.|$)")),
    (FEED_FORWARD, re.compile(r"\.\d+\.")),
)
PARTS = (ATTENTION, FEED_FORWARD, EXPERTS, ROUTERS, NORMS, EMBEDDINGS, HEAD, OTHER)
_USUAL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "w1", "w3", "w2")


def plain(text: str) -> str:
    """Replace characters that HTML cannot contain, such as control characters and invalid UTF-8."""
    return "".join(char if char.isprintable() else "\ufffd" for char in text)


def part(name: str) -> str:
    """Which part of a model a tensor or module belongs to."""
    return next((found for found, pattern in _PARTS if pattern.search(name)), OTHER)


def shape(sizes: Iterable[int]) -> str:
    """A shape as text: 576x1536."""
    return "x".join(map(str, sizes))


def layer(name: str) -> int | None:
    """The layer number of a module: the first number in its name. None if it has none."""
    found = re.search(r"(?:^|\.)(\d{1,9})(?:\.|$)", name)
    return int(found[1]) if found else None


def natural(name: str) -> list[tuple[int, str]]:
    """A sort key that puts layer 2 before layer 10."""
    return [(int(word), "") if word.isdecimal() else (-1, word) for word in name.split(".")]


def kinds(modules: Iterable[str]) -> dict[str, str]:
    """The type of each module: the shortest end of its name that distinguishes it from the others.

    Layer and expert numbers are left out. If a model has several stacks of layers (encoder and decoder), the first
    word of the name is put in front.

    Returns:
        Module name -> type.
    """
    words = {name: tuple(word for word in name.split(".") if not word.isdigit()) for name in modules}
    known = set(words.values())
    ends = {own: _end(own, {other for other in known if other[:1] == own[:1]}) for own in known}
    several = {end for end in ends.values() if sum(end == other for other in ends.values()) > 1}
    labels = {own: ".".join(end) if end not in several else f"{own[0]} {'.'.join(end)}" for own, end in ends.items()}
    return {name: labels[own] or name for name, own in words.items()}


def by_layer(values: Mapping[str, float]) -> dict[str, dict[str, dict[float, list[float]]]]:
    """Group values of modules by part of the model, module type and layer, in the order of computation.

    A layer has several modules of one type if they are experts. Modules outside of layers are left out.

    Args:
        values: Module name -> value.

    Returns:
        Part -> module type -> layer -> values.
    """
    numbers = {name: number for name in values if (number := layer(name)) is not None}
    labels = kinds(numbers)
    found: dict[str, dict[str, dict[float, list[float]]]] = {}
    for name in sorted(numbers, key=lambda name: (PARTS.index(part(name)), _rank(labels[name]), natural(name))):
        points = found.setdefault(part(name), {}).setdefault(labels[name], {})
        points.setdefault(numbers[name], []).append(values[name])
    return found


def _rank(kind: str) -> int:
    """The rank of a common module type; all others come after, in alphabetical order."""
    return next((i for i, usual in enumerate(_USUAL) if kind.endswith(usual)), len(_USUAL))


def _end(words: tuple[str, ...], known: set[tuple[str, ...]]) -> tuple[str, ...]:
    """The shortest end of a name that no other name shares."""
    lengths = range(1, len(words))
    return next((words[-n:] for n in lengths if sum(other[-n:] == words[-n:] for other in known) == 1), words)
