"""The codes that calibration chose (`--rounding gptq`), in a file beside the unfinished artifact.

The choice runs the model once and decides one weight after another, so it is made before any weight file is written, by
one process for all. The file has the codes int8 [N, K] and the scales float32 [N, G] of each weight, in the order in
which they were chosen. Its index is a journal with their shapes and digests. A process that was stopped continues after
the last weight whose bytes have these digests: the model then runs with the codes that are there, and the rest is the
same.
"""

from __future__ import annotations

import math
import os
import re
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from quantize8.artifact.manifest import TensorRecord, digest
from quantize8.conversion.plan import Plan
from quantize8.destinations.base import CALIBRATION_NAMES
from quantize8.destinations.journal import Journal, Records
from quantize8.errors import OutputError
from quantize8.kernels import GPTQ, NEAREST
from quantize8.kernels.reference import Array, as_bytes
from quantize8.memory import peak_rss

_, CODES_NAME, INDEX_NAME = CALIBRATION_NAMES
_CODES, _NEAREST, _SCALES = "codes", "nearest", "scales"  # a weight has codes, or those to nearest, and scales
_COMPLETE = ""  # the name under which the index says that the choice is complete
_RESIDUALS, _PRODUCTS = 4, 2.5  # copies of the residual stream, and of the widest activations, that are alive at once
_LAYER = re.compile(r".*?\.\d+(?=\.)")  # what the names of a decoder layer's tensors begin with
_RETRY_SECONDS = 1.0  # until the process that makes the choice is asked again whether it is done


class _Place(NamedTuple):
    """Where the codes and scales of a weight are in the file."""

    offset: int
    codes: tuple[int, int]  # shape [N, K]
    scales: tuple[int, int]  # shape [N, G]


@dataclass(frozen=True)
class RoundedWeights:
    """Codes and scales that were chosen, readable by rows from any thread.

    Attributes:
        path: The file.
        places: Source tensor -> where its codes are.
        nearest: The source tensors that were rounded to nearest, because the text gives their layers too few inputs.
    """

    path: Path
    places: dict[str, _Place]
    nearest: frozenset[str] = frozenset()

    def __contains__(self, name: str) -> bool:
        return name in self.places

    def rounding_of(self, name: str) -> str:
        """How the codes of a source tensor were chosen, gptq or nearest."""
        return GPTQ if name in self and name not in self.nearest else NEAREST

    def rows(self, name: str, start: int, stop: int) -> tuple[Array, Array]:
        """Rows start..stop of a weight: codes int8 [n, K], and scales float32 [n, G]."""
        offset, (rows, columns), (_, groups) = self.places[name]
        with self.path.open("rb") as file:
            file.seek(offset + start * columns)
            codes = np.fromfile(file, np.int8, (stop - start) * columns)
            file.seek(offset + rows * columns + 4 * start * groups)
            scales = np.fromfile(file, np.float32, (stop - start) * groups)
        return codes.reshape(-1, columns), scales.reshape(-1, groups)


@dataclass(frozen=True)
class RoundingCost:
    """What the choice of codes needs before the weight files are written."""

    seconds: float
    memory: int  # bytes: peak memory of the process
    disk: int  # bytes of the file, until the conversion ends


def cost_of(plan: Plan) -> RoundingCost:
    """Predict the cost of choosing a plan's codes, from a layer that is made up and measured.

    The time is that of the weights' products, Gram matrices, factors and codes. Each weight is assumed to have an input
    of its own, although some share one. The memory is that of the largest decoder layer in float32, the activations of
    the text between its parts in float64, and the largest Gram matrix.
    """
    from quantize8.calibration.rounding import ROUNDING_TOKENS, sample_rates

    shapes = {name: plan.shape_of(plan.checkpoint.tensors[name]) for name in plan.quantized}
    matrices = [shape for shape in shapes.values() if len(shape) == 2]
    layers: Counter[str] = Counter()
    for name, shape in shapes.items():
        layer = _LAYER.match(name)
        layers[layer[0] if layer else name] += math.prod(shape)
    rates, most = sample_rates(), max((columns for _, columns in matrices), default=0)
    seconds = sum(
        ROUNDING_TOKENS * rows * columns / rates.product
        + ROUNDING_TOKENS * columns**2 / rates.gram
        + columns**3 / rates.factor
        + rows * columns**2 / rates.codes
        for rows, columns in matrices
    )
    widths = sorted(columns for _, columns in matrices)
    usual = widths[len(widths) // 2] if widths else 0
    activations = 8 * ROUNDING_TOKENS * (_RESIDUALS * usual + _PRODUCTS * most)
    memory = peak_rss() + 4 * max(layers.values(), default=0) + activations + 8 * most**2
    return RoundingCost(seconds, int(memory), sum(math.prod(shape) for shape in matrices))


def rounded(
    plan: Plan,
    folder: Path,
    decisions: dict[str, Any],
    start_over: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Plan, str]:
    """Choose the codes of a plan's weights, or read those that are chosen already.

    Args:
        plan: The plan, calibrated.
        folder: The folder of the file and its index.
        decisions: The decisions of the plan; codes of other decisions are refused.
        start_over: Replace such codes instead of refusing them.
        progress: Called with the source bytes of the weights that are done, and of all.

    Returns:
        The plan with the codes, and a digest of all of them.

    Raises:
        SourceError: The model cannot run, has no tokenizer, or computes NaN or infinity.
        OutputError: The codes are of a conversion with other options.
    """
    choice = _Choice(plan, folder, decisions, start_over)
    try:
        if not choice.is_complete:
            choice.make(progress)
        nearest = frozenset(name for name, records in choice.entries.items() if _NEAREST in records)
        found = RoundedWeights(folder / CODES_NAME, dict(choice.places), nearest)
        content = "".join(record.blake3 for records in choice.entries.values() for record in records.values())
        return replace(plan, rounded=found), digest(content.encode())
    finally:
        choice.close()


@dataclass
class _Choice:
    """The choice in the making: what `calibration.rounding.choose_codes` asks, and where it puts the codes."""

    plan: Plan
    folder: Path
    decisions: dict[str, Any]
    start_over: bool
    places: dict[str, _Place] = field(default_factory=dict)  # source tensor -> where its codes are

    def __post_init__(self) -> None:
        self._wanted = frozenset(self.plan.quantized)
        self._index = self._locked()
        stated = self._index.heading.get("decisions", self.decisions)
        if stated != self.decisions and not self.start_over:
            self._index.close()
            raise OutputError(f"{self._index.path}: is of other options or another source; start over with --overwrite")
        self._file = (self.folder / CODES_NAME).open("a+b")
        entries = self._valid() if stated == self.decisions else {}
        self._file.truncate(sum(map(_nbytes, self.places.values())))
        self._index.begin({"decisions": self.decisions}, entries)

    @property
    def entries(self) -> dict[str, Records]:
        """The entries of the index."""
        return self._index.entries

    @property
    def is_complete(self) -> bool:
        """Whether all codes are chosen."""
        return _COMPLETE in self.entries

    def make(self, progress: Callable[[int, int], None] | None) -> None:
        """Choose the codes that are not chosen yet."""
        from quantize8.calibration.rounding import choose_codes

        if self.plan.text is None:
            raise OutputError(f"{self._index.path}: missing; run convert again")
        choose_codes(self.plan.checkpoint, self.plan.text, self, progress=progress)
        self._file.flush()
        os.fsync(self._file.fileno())
        self._index.append(_COMPLETE, {})

    def close(self) -> None:
        """Release the file and the index."""
        self._file.close()
        self._index.close()

    def wants(self, name: str) -> bool:
        """See `calibration.rounding.Rounding`."""
        return name in self._wanted

    def rotation(self, name: str) -> int:
        """See `calibration.rounding.Rounding`."""
        return self.plan.rotations.get(name, 0)

    def scales(self, name: str, weight: Array, importance: Array) -> tuple[Array, Array]:
        """See `calibration.rounding.Rounding`."""
        return self.plan.format.choose_scales(self.plan, name, weight, importance)

    def stored(self, name: str) -> tuple[Array, Array] | None:
        """See `calibration.rounding.Rounding`."""
        if name not in self.places:
            return None
        return RoundedWeights(self.folder / CODES_NAME, self.places).rows(name, 0, self.places[name].codes[0])

    def keep(self, name: str, codes: Array, scales: Array, is_nearest: bool) -> None:
        """See `calibration.rounding.Rounding`."""
        place, records = _Place(self._file.seek(0, os.SEEK_END), codes.shape, scales.shape), Records()
        for kind, dtype, values in ((_NEAREST if is_nearest else _CODES, "I8", codes), (_SCALES, "F32", scales)):
            data = as_bytes(np.ascontiguousarray(values))
            self._file.write(data)
            records[kind] = TensorRecord(CODES_NAME, dtype, values.shape, digest(data))
        self._file.flush()
        self.places[name] = place
        self._index.append(name, records)

    def _locked(self) -> Journal:
        while True:
            try:
                return Journal(self.folder / INDEX_NAME)
            except BlockingIOError:  # another process makes the choice, for all
                time.sleep(_RETRY_SECONDS)

    def _valid(self) -> dict[str, Records]:
        """The leading entries of the index whose bytes are in the file; fills in their places."""
        valid: dict[str, Records] = {}
        self._file.seek(0)
        for name, records in self._index.entries.items():
            if name != _COMPLETE:
                stored = [records[_NEAREST if _NEAREST in records else _CODES], records[_SCALES]]
                place = _Place(self._file.tell(), *(record.shape for record in stored))  # type: ignore[arg-type]
                sizes = (_nbytes(place) - _scale_bytes(place), _scale_bytes(place))
                if [digest(self._file.read(nbytes)) for nbytes in sizes] != [record.blake3 for record in stored]:
                    break
                self.places[name] = place
            valid[name] = records
        return valid


def _scale_bytes(place: _Place) -> int:
    return 4 * place.scales[0] * place.scales[1]


def _nbytes(place: _Place) -> int:
    return place.codes[0] * place.codes[1] + _scale_bytes(place)
