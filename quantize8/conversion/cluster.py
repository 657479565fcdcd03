"""A conversion on a Ray cluster: one task per weight file on any free node; this process finishes it.

Source and output are on a file system that all nodes see under the same paths, or in object stores. Any task can be
repeated by any process (`driver.write`), so Ray retries a task if its worker or node is lost. An error of the
conversion itself, such as an unreadable source, ends all tasks.
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

_RETRIES = 5  # retries of a task whose worker or node was lost; spot instances can be reclaimed more than once
_LOOK = 10.0  # seconds between two checks of the nodes
_PATIENCE = 600.0  # seconds to wait for a node with enough CPUs and GPUs; autoscalers take minutes to start one
_UNLOCK = 120.0  # seconds to wait for the lock of a lost node; NFS releases it after 90
_ANSWER = 10.0  # seconds to wait for an answer of the cluster's head node
_CANCEL = 60.0  # seconds for canceled tasks to end and clean up


@dataclass(frozen=True)
class Nodes:
    """The cluster, and the resources of a node that a task uses."""

    address: str | None = None  # None: RAY_ADDRESS if set, otherwise a temporary cluster on this machine
    device: str = "auto"  # with cuda, each task uses one GPU; otherwise none
    workers: int | None = None  # threads and CPUs per task; None: 1, as tasks run in parallel

    @property
    def needs(self) -> dict[str, int]:
        """The resources of a task, by Ray's names."""
        return {"CPU": self.workers or 1, "GPU": int(self.device == "cuda")}


@dataclass(frozen=True)
class _Task:
    """The arguments that all tasks share."""

    options: ConvertOptions
    out: Destination
    nodes: Nodes
    token: str | None
    decisions: dict[str, Any]  # of the process that started the tasks; a node with other decisions must not write


def write_all(
    plan: Plan,
    out: Destination,
    nodes: Nodes,
    overwrite: bool = False,
    token: str | None = None,
    progress: Progress | None = None,
) -> Conversion:
    """Write all weight files on the nodes of a cluster, or resume writing them, and finish the artifact.

    While this runs, standard output is redirected to standard error, because Ray prints there.

    Args:
        plan: The plan of the conversion, not yet calibrated.
        out: Where the artifact is written.
        nodes: The cluster, and the resources of each task.
        overwrite: Replace an existing artifact, and discard unfinished work with other options.
        token: Hub token.
        progress: Called when a weight file is complete, with the number of source bytes done, and in total.

    Returns:
        The result with the manifest.

    Raises:
        DependencyError: Ray is not installed.
        OutputError: There is no cluster or no node with enough CPUs or GPUs, or a task lost its node too often.
        Quantize8Error: A task raised it.
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
    """Write one weight file in a worker; returns the number and bytes of tensors that were already written."""
    plan = _plan(task.options, task.token, json.dumps(task.decisions))
    decisions = plan.decisions()
    if decisions != task.decisions:
        raise OutputError(
            f"{socket.gethostname()}: this node has {difference(decisions, task.decisions)}; "
            "install the same quantize8 on all nodes, and make sure that all see the same files"
        )
    device = "cpu" if task.nodes.device == "auto" else task.nodes.device  # Ray gives GPUs to tasks that request them
    quantizers = make_quantizers(device, task.options.scale, task.nodes.workers or 1)
    journal = partial_of(task.out.scratch) / f"{plan.units[number - 1].shard.file}{SUFFIX}"
    deadline = time.monotonic() + _UNLOCK
    while is_locked(journal) and time.monotonic() < deadline:  # by the first run of this task, which is ending
        time.sleep(0.1)
    result = write(plan, task.out, Part(number, len(plan.units)), quantizers, overwrite)
    return result.resumed, result.resumed_bytes


@functools.lru_cache(maxsize=1)
def _plan(options: ConvertOptions, token: str | None, _: str) -> Plan:
    """The plan, cached for the next task: 92,000 tensors take seconds to plan. Other decisions make a new plan."""
    return make_plan(options, token)


def _run(ray: Any, plan: Plan, task: _Task, overwrite: bool, progress: Progress | None) -> Iterator[tuple[int, int]]:
    """Run the tasks, and yield their results in the order in which they end."""
    needs, units = task.nodes.needs, plan.units
    remote = ray.remote(_write).options(
        name="quantize8 convert",
        num_cpus=needs["CPU"],
        num_gpus=needs["GPU"],
        max_retries=_RETRIES,
        retry_exceptions=False,  # retry only if a worker or node is lost
    )
    nbytes = {unit.number: unit.read_bytes for unit in units}
    done, total = 0, sum(nbytes.values())
    # The first task runs alone if the others depend on it: it calibrates, or removes what is replaced.
    alone = 1 if plan.calibration or overwrite else 0
    for group in filter(None, (units[:alone], units[alone:])):
        refs = {remote.remote(task, unit.number, overwrite): unit for unit in group}
        for unit, result in _results(ray, refs, needs):
            done += nbytes[unit.number]
            if progress is not None:
                progress(done, total)
            yield result


def _results(ray: Any, refs: dict[Any, WorkUnit], needs: dict[str, int]) -> Iterator[tuple[WorkUnit, tuple[int, int]]]:
    """Yield each unit with the result of its task as tasks end; the first failure cancels the others."""
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
                raise OutputError(f"engine ray: no node of the cluster has {asked}; add one, or request less")
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
            "run the same command again, which resumes from here"
        ) from None


def _has_room(ray: Any, needs: dict[str, int]) -> bool:
    """Whether any node has enough resources for a task, even if it is busy now."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return any(all(node.get(kind, 0) >= count for kind, count in needs.items()) for node in nodes)


@contextlib.contextmanager
def _connected(ray: Any, address: str | None) -> Iterator[None]:
    """Connect to the cluster; an existing connection of this process is used and left open."""
    if ray.is_initialized():
        yield
        return
    address = address or os.environ.get("RAY_ADDRESS") or "local"
    local = {"include_dashboard": False} if address == "local" else {}
    if local:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # do not send usage statistics to Ray's developers
    try:
        _check_address(address)
        ray.init(address, log_to_driver=False, logging_level=logging.ERROR, **local)
    except (OSError, ValueError, RuntimeError) as error:
        raise OutputError(
            f"address {address}: no Ray cluster can be used there ({first_line(error)}); "
            "start one with ray start --head, or leave out --address"
        ) from None
    with contextlib.redirect_stdout(sys.stderr):  # if a node is lost, Ray prints its last log lines
        try:
            yield
        finally:
            ray.shutdown()


def _check_address(address: str) -> None:
    """Raise OSError if nothing answers at HOST:PORT; Ray itself would retry for minutes and then exit."""
    host, _, port = address.rpartition("://")[2].rpartition(":")
    if host and port.isdecimal():
        socket.create_connection((host.strip("[]"), int(port)), timeout=_ANSWER).close()


def _ray() -> Any:
    try:
        import ray
    except ImportError:
        raise DependencyError("ray: not installed, needed for --engine ray: pip install 'quantize8[ray]'") from None
    return ray
