"""The units of a conversion's work: a weight file, and what is written together with it. Any process can write one."""

from __future__ import annotations

from dataclasses import dataclass

from quantize8.artifact.layout import OutTensor, Shard, place
from quantize8.artifact.plan import Plan


@dataclass(frozen=True)
class Unit:
    """One weight file, with the outlier columns of its modules: `outliers` is a file that no loader sees."""

    number: int  # from 1
    shard: Shard
    sources: list[str]  # source tensors, in storage order, then computed ones: keys of the plan's `outputs`
    outliers: Shard | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of its files."""
        return self.shard.nbytes + (self.outliers.nbytes if self.outliers else 0)


def units(plan: Plan) -> list[Unit]:
    """One for each weight file; each source tensor is in one of them, with all that becomes of it."""
    numbers = {tensor.name: number for number, shard in enumerate(plan.shards) for tensor in shard.tensors}
    sources: list[list[str]] = [[] for _ in plan.shards]
    computed = [name for name in plan.outputs if name not in plan.checkpoint.tensors]
    for name in [*plan.checkpoint.tensors, *computed]:
        if name in plan.outputs:  # GGUF has no place for some
            sources[numbers[plan.outputs[name][0].name]].append(name)
    return [
        Unit(number + 1, shard, names, _outliers(plan, shard, names))
        for number, (shard, names) in enumerate(zip(plan.shards, sources, strict=True))
    ]


def beside(file: str) -> str:
    """The name of the file that keeps the outlier columns of a weight file's modules until all are brought together."""
    return f"{file}.outliers"


def _outliers(plan: Plan, shard: Shard, sources: list[str]) -> Shard | None:
    modules = [name.removesuffix(".weight") for name in sources]
    tensors: list[OutTensor] = [
        tensor for name in modules if name in plan.calibrated for tensor in plan.outlier_tensors(name)
    ]
    return place(Shard(beside(shard.file), tensors)) if tensors else None
