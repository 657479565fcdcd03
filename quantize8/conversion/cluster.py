"""A conversion on a Ray cluster: a task for each weight file, on whichever node is free, and the end of it here.

Source and output lie on a file system that all nodes see, at the same paths, or in stores. What a task does can be done
again by any other (`driver.write`), so Ray runs it again when its worker or its node is lost. A user's error ends
it all.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
import socket
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from quantize8.conversion.driver import Progress, check_workers, finalize, make_quantizers, write
from quantize8.conversion.options import ConvertOptions
from quantize8.conversion.parts import Part
from quantize8.conversion.plan import Plan, WorkUnit, make_plan
from quantize8.conversion.result import Conversion
from quantize8.destinations.base import Destination
from quantize8.destinations.journal import SUFFIX, is_locked
from quantize8.destinations.local import LocalFolder, check_disk, difference, partial_of
from quantize8.errors import DependencyError, OutputError, Quantize8Error, first_line

_RETRIES = 5  # of a task whose worker or node was lost; nodes of a cloud are taken back more than once in a while
_LOOK = 10.0  # seconds between two looks at the nodes
_PATIENCE = 600.0  # seconds until a node with what a task needs must be there: autoscalers start one in minutes
_UNLOCK = 120.0  # seconds until the lock of a lost node is free: NFS lets it go after 90
_ANSWER = 10.0  # seconds for the cluster's head to answer
_CANCEL = 60.0  # seconds that cancelled tasks have to end, and to remove what they began


@dataclass(frozen=True)
class Nodes:
    """The cluster, and what a task takes of a node."""

    address: str | None = None  # None is RAY_ADDRESS, else a cluster on this machine that ends with the conversion
    device: str = "auto"  # cuda takes a GPU for each task, all others none
    workers: int | None = None  # threads, and CPUs, for each task; None is one: tasks run side by side

    @property
    def needs(self) -> dict[str, int]:
        """Ray's resources."""
        return {"CPU": self.workers or 1, "GPU": int(self.device == "cuda")}


@dataclass(frozen=True)
class _Task:
    """What each task is told."""

    options: ConvertOptions
    out: Destination
    nodes: Nodes
    token: str | None
    decisions: dict[str, Any]  # of the process that began it all: a node that decides otherwise must not write


def write_all(
    plan: Plan,
    out: Destination,
    nodes: Nodes,
    overwrite: bool = False,
    token: str | None = None,
    progress: Progress | None = None,
) -> Conversion:
    """Have the nodes write all weight files, or go on with them, and make an artifact of these.

    `progress` hears of a weight file when it is whole; what is printed meanwhile goes to the error stream.
    Raises DependencyError without Ray; OutputError where there is no cluster, no node with enough CPUs or GPUs, or
    where a task lost its node again and again; and what a task raised.
    """
    ray = _ray()
    check_workers(nodes.workers)
    if isinstance(out, LocalFolder):
        check_disk(out.out, out.missing_bytes(plan.units))
        out = LocalFolder(out.out.absolute())
    task = _Task(plan.options.absolute(), out, nodes, token, plan.decisions())
    resumed = resumed_bytes = 0
    with _connected(ray, nodes.address):
        for tensors, nbytes in _run(ray, plan, task, overwrite, progress):
            resumed, resumed_bytes = resumed + tensors, resumed_bytes + nbytes
    result = finalize(out, overwrite, token, plan)
    result.resumed, result.resumed_bytes = resumed, resumed_bytes
    return result


def _write(task: _Task, number: int, overwrite: bool) -> tuple[int, int]:
    """In a worker: one weight file. Returns how many tensors were there already, and their bytes."""
    plan = _plan(task.options, task.token, json.dumps(task.decisions))
    decisions = plan.decisions()
    if decisions != task.decisions:
        raise OutputError(
            f"{socket.gethostname()}: this node has {difference(decisions, task.decisions)}; "
            "install the same quantize8 on all nodes, and let all see the same files"
        )
    device = "cpu" if task.nodes.device == "auto" else task.nodes.device  # Ray gives a GPU to who asks for it
    quantizers = make_quantizers(device, task.options.scale, task.nodes.workers or 1)
    journal = partial_of(task.out.scratch) / f"{plan.units[number - 1].shard.file}{SUFFIX}"
    deadline = time.monotonic() + _UNLOCK
    while is_locked(journal) and time.monotonic() < deadline:  # by this task's first run, which is ending
        time.sleep(0.1)
    result = write(plan, task.out, Part(number, len(plan.units)), quantizers, overwrite)
    return result.resumed, result.resumed_bytes


@functools.lru_cache(maxsize=1)
def _plan(options: ConvertOptions, token: str | None, _: str) -> Plan:
    """The plan of one task after the other: that of 92,000 tensors takes seconds. Other decisions make a new one."""
    return make_plan(options, token)


def _run(ray: Any, plan: Plan, task: _Task, overwrite: bool, progress: Progress | None) -> Iterator[tuple[int, int]]:
    """What each task returns, in the order in which they end."""
    needs, units = task.nodes.needs, plan.units
    remote = ray.remote(_write).options(
        name="quantize8 convert",
        num_cpus=needs["CPU"],
        num_gpus=needs["GPU"],
        max_retries=_RETRIES,
        retry_exceptions=False,  # only where a worker or a node is lost
    )
    nbytes = {unit.number: unit.read_bytes for unit in units}
    done, total = 0, sum(nbytes.values())
    # The first is alone where it decides for the others: it measures the text, or removes what is replaced.
    alone = 1 if plan.calibration or overwrite else 0
    for group in filter(None, (units[:alone], units[alone:])):
        refs = {remote.remote(task, unit.number, overwrite): unit for unit in group}
        for unit, result in _results(ray, refs, needs):
            done += nbytes[unit.number]
            if progress is not None:
                progress(done, total)
            yield result


def _results(ray: Any, refs: dict[Any, WorkUnit], needs: dict[str, int]) -> Iterator[tuple[WorkUnit, tuple[int, int]]]:
    """Each unit with what its task returned, as they end; at the first failure the other tasks are cancelled."""
    waiting = list(refs)
    deadline = time.monotonic() + _PATIENCE
    try:
        while waiting:
            ready, waiting = ray.wait(waiting, timeout=_LOOK)
            for ref in ready:
                yield refs[ref], _result(ray, ref, refs[ref])
            if ready or _has_room(ray, needs):
                deadline = time.monotonic() + _PATIENCE
            elif time.monotonic() > deadline:
                asked = " and ".join(f"{count} {kind}" for kind, count in needs.items() if count)
                raise OutputError(f"engine ray: no node of the cluster has {asked}; add one, or ask for less")
    finally:
        for ref in waiting:
            ray.cancel(ref)
        if waiting:
            ray.wait(waiting, num_returns=len(waiting), timeout=_CANCEL)


def _result(ray: Any, ref: Any, unit: WorkUnit) -> tuple[int, int]:
    try:
        found: tuple[int, int] = ray.get(ref)
        return found
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, Quantize8Error):
            raise error.cause from None
        raise
    except ray.exceptions.RayError as error:
        raise OutputError(
            f"{unit.shard.file}: its task on the cluster was lost ({first_line(error)}); "
            "run the same command again, which goes on from here"
        ) from None


def _has_room(ray: Any, needs: dict[str, int]) -> bool:
    """Whether any node is large enough for a task, were it free."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return any(all(node.get(kind, 0) >= count for kind, count in needs.items()) for node in nodes)


@contextlib.contextmanager
def _connected(ray: Any, address: str | None) -> Iterator[None]:
    """A connection to the cluster, unless this process has one: that one is used, and left open."""
    if ray.is_initialized():
        yield
        return
    address = address or os.environ.get("RAY_ADDRESS") or "local"
    local = {"include_dashboard": False} if address == "local" else {}
    if local:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is reported to Ray's makers
    try:
        _check_address(address)
        ray.init(address, log_to_driver=False, logging_level=logging.ERROR, **local)
    except (OSError, ValueError, RuntimeError) as error:
        raise OutputError(
            f"address {address}: no Ray cluster can be used there ({first_line(error)}); "
            "begin one with ray start --head, or leave out --address"
        ) from None
    with contextlib.redirect_stdout(sys.stderr):  # where a node is lost, a thread of Ray's prints its last log lines
        try:
            yield
        finally:
            ray.shutdown()


def _check_address(address: str) -> None:
    """Raise OSError where nothing answers at HOST:PORT: Ray itself would try for minutes, and end the process."""
    host, _, port = address.rpartition("://")[2].rpartition(":")
    if host and port.isdecimal():
        socket.create_connection((host.strip("[]"), int(port)), timeout=_ANSWER).close()


def _ray() -> Any:
    try:
        import ray
    except ImportError:
        raise DependencyError("ray: not installed, needed for --engine ray: pip install 'quantize8[ray]'") from None
    return ray
