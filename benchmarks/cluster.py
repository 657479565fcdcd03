"""Compares a Ray cluster of several nodes on this machine with a single process: time, and identity of the bytes.

Each node offers Ray one CPU, and no more processes run in parallel than the machine has CPUs. Every round measures one
process with one thread, one process with one thread per CPU, the cluster, and the cluster with a node that is killed
when a third of the weight files are complete (and replaced afterwards). Workers are restarted for each conversion.

Run: python -m benchmarks.cluster CHECKPOINT [--nodes 3] [--rounds 3] [--max-shard-size 100MB] [--folder FOLDER]
"""

from __future__ import annotations

import argparse
import logging
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from quantize8 import convert
from quantize8.conversion.result import Conversion
from tests.helpers.artifacts import digests

NODE = {"num_cpus": 1, "object_store_memory": 80 * 2**20, "include_dashboard": False}


class Nodes:
    """A Ray cluster of several nodes on this machine, each with its own processes, and a connection to its head."""

    def __init__(self, count: int) -> None:
        import ray
        from ray.cluster_utils import Cluster

        os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
        os.environ["PYTHONPATH"] = str(Path(__file__).parents[1])
        self.ray, self.cluster = ray, Cluster(True, head_node_args=NODE)
        for _ in range(count - 1):
            self.cluster.add_node(**NODE)
        ray.init(self.cluster.address, log_to_driver=False, logging_level=logging.ERROR)

    def kill(self) -> None:
        """Kill one of the nodes with all its processes, without shutting it down first."""
        self.cluster.remove_node(next(iter(self.cluster.worker_nodes)), allow_graceful=False)

    def fix(self) -> None:
        """Start a new node in place of the killed one."""
        self.cluster.add_node(**NODE)

    def close(self) -> None:
        """Stop all nodes."""
        self.ray.shutdown()
        self.cluster.shutdown()


def killing(nodes: Nodes, after: int) -> Callable[[int, int], None]:
    """Make a progress callback, called once per complete weight file, that kills a node after `after` files."""
    heard: list[int] = []

    def hear(done: int, _: int) -> None:
        heard.append(done)
        if len(heard) == after:
            nodes.kill()

    return hear


def main() -> None:
    """Print the median time of each variant, and check that all variants write the same bytes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source")
    parser.add_argument("--nodes", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--max-shard-size", default="100MB")
    parser.add_argument("--folder", type=Path, default=None, help="where to work (default: a temporary folder)")
    given = parser.parse_args()
    source, size = str(Path(given.source).absolute()), given.max_shard_size
    nodes = Nodes(given.nodes)
    files = len(convert(source, "planned", dry_run=True, max_shard_size=size).plan.shards)

    def on_nodes(out: Path, **more: Any) -> Conversion:
        return convert(source, out, engine="ray", max_shard_size=size, **more)

    def on_nodes_killing(out: Path) -> Conversion:
        try:
            return on_nodes(out, progress=killing(nodes, max(1, files // 3)))
        finally:
            nodes.fix()

    ways: dict[str, Callable[[Path], Conversion]] = {
        "one process, one thread": lambda out: convert(source, out, workers=1, max_shard_size=size),
        f"one process, {os.cpu_count()} threads": lambda out: convert(source, out, max_shard_size=size),
        f"{given.nodes} nodes": on_nodes,
        f"{given.nodes} nodes, one killed": on_nodes_killing,
    }
    times: dict[str, list[float]] = {way: [] for way in ways}
    try:
        with tempfile.TemporaryDirectory(dir=given.folder) as name:
            expected = None
            for _ in range(given.rounds):
                for way, run in ways.items():
                    out = Path(name) / "out"
                    start = time.perf_counter()
                    run(out)
                    times[way].append(time.perf_counter() - start)
                    expected = expected or digests(out)
                    assert digests(out) == expected, f"{way}: other bytes"
                    shutil.rmtree(out)
    finally:
        nodes.close()
    print(f"{files} weight files, all artifacts identical")
    base = times["one process, one thread"]
    for way, found in times.items():
        ratio = statistics.median(one / other for one, other in zip(base, found, strict=True))
        print(f"{way}: {statistics.median(found):.1f} s ({min(found):.1f} to {max(found):.1f}), {ratio:.2f}x")


if __name__ == "__main__":
    main()
