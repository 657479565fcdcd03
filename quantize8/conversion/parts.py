"""The share of the weight files that this process writes when several processes convert one source."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from quantize8.errors import OutputError

_Unit = TypeVar("_Unit")


@dataclass(frozen=True)
class Part:
    """Share `number` (counted from 1) of `count` shares of the weight files."""

    number: int
    count: int

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"

    def of(self, units: Sequence[_Unit]) -> list[_Unit]:
        """The consecutive weight files of this share.

        All shares have about the same number of files. With fewer files than shares, some shares are empty.

        Args:
            units: All weight files, in order.
        """
        start, stop = (-(-number * len(units) // self.count) for number in (self.number - 1, self.number))
        return list(units[start:stop])


def parse_part(text: str, environment: Mapping[str, str] = os.environ) -> Part:
    """Parse the value of --part.

    Args:
        text: "i/n" for share i of n; or "auto" for the share of this process in a Slurm array or under torchrun.
        environment: Environment variables, which "auto" reads.

    Raises:
        OutputError: The text is not a share, or the variables are missing or inconsistent.
    """
    if text == "auto":
        return _from(environment)
    match = re.fullmatch(r"(\d+)/(\d+)", text.strip())
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        raise OutputError(f"part {text}: not a share; write for example 1/4, the first of four, or auto")
    return Part(int(match[1]), int(match[2]))


def _from(environment: Mapping[str, str]) -> Part:
    if "SLURM_ARRAY_TASK_ID" in environment:
        names, least = ("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_COUNT"), environment.get("SLURM_ARRAY_TASK_MIN", "0")
    elif "RANK" in environment:
        names, least = ("RANK", "WORLD_SIZE"), "0"
    else:
        raise OutputError("part auto: neither SLURM_ARRAY_TASK_ID nor RANK is set; write for example --part 1/4")
    step = environment.get("SLURM_ARRAY_TASK_STEP", "1") if names[0].startswith("SLURM") else "1"
    try:
        position, count, first, width = (int(text) for text in (*(environment[name] for name in names), least, step))
        part = Part((position - first) // width + 1, count)
    except (KeyError, ValueError, ZeroDivisionError):
        raise OutputError(f"part auto: {' and '.join(names)} are not two numbers; write for example 1/4") from None
    if not 1 <= part.number <= part.count:
        raise OutputError(f"part auto: {names[0]} {position} is beyond {names[1]} {count}; write for example 1/4")
    return part
