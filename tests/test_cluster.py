"""Conversions on a Ray cluster of three nodes on this machine: the bytes of one process, whatever fails."""

import json
import logging
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers.artifacts import digests
from helpers.making import llama, word_tokenizer

from quantize8 import DependencyError, OutputError, WeightError, convert, verify
from quantize8.commands.finalize import finalize
from quantize8.conversion import cluster as module
from quantize8.conversion.options import ConvertOptions
from quantize8.conversion.plan import make_plan
from quantize8.destinations.journal import SUFFIX, Journal
from quantize8.destinations.local import LocalFolder, partial_of

SIZE = {"max_shard_size": "6KB"}  # several files of the tiny Llama
SMALL = {"num_cpus": 1, "object_store_memory": 80 * 2**20, "include_dashboard": False}
QUICK = {"health_check_initial_delay_ms": 500, "health_check_period_ms": 500, "health_check_failure_threshold": 3}


@pytest.fixture(scope="module")
def nodes():
    """Three nodes with a processor each; this process is connected to the first."""
    ray = pytest.importorskip("ray", reason="ray is not installed: pip install 'quantize8[ray]'")
    from ray.cluster_utils import Cluster

    patch = pytest.MonkeyPatch()
    patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    patch.setenv("PYTHONPATH", os.pathsep.join([str(Path(module.__file__).parents[2]), *sys.path]))
    cluster = Cluster(True, head_node_args={**SMALL, "_system_config": QUICK})
    try:
        for _ in range(2):
            cluster.add_node(**SMALL)
        ray.init(cluster.address, log_to_driver=False, logging_level=logging.ERROR)
        yield cluster
    finally:
        ray.shutdown()
        cluster.shutdown()
        patch.undo()


@pytest.fixture
def source(tmp_path):
    return str(word_tokenizer(llama(tmp_path / "source", shards=2)))


def test_the_artifact_is_that_of_one_process(nodes, source, tmp_path, monkeypatch):
    whole, heard = convert(source, tmp_path / "whole", **SIZE), []
    monkeypatch.chdir(tmp_path)  # paths are the driver's
    done = convert("source", "out", engine="ray", progress=lambda done, total: heard.append((done, total)), **SIZE)
    assert digests(tmp_path / "out") == digests(tmp_path / "whole") and verify(tmp_path / "out")
    assert done.manifest == whole.manifest and done.errors == whole.errors and not done.resumed
    assert len(heard) == len(whole.plan.shards) > 3 and heard == sorted(heard)
    assert heard[-1] == (whole.plan.source_bytes, whole.plan.source_bytes)
    with pytest.raises(OutputError, match="exists"):
        convert(source, tmp_path / "out", engine="ray", **SIZE)
    convert(source, tmp_path / "out", threshold=5.0, part="2/3", overwrite=True, **SIZE)  # what is begun is given up
    convert(source, tmp_path / "out", engine="ray", overwrite=True, recipe="int8-all", **SIZE)
    convert(source, tmp_path / "all", recipe="int8-all", **SIZE)
    assert digests(tmp_path / "out") == digests(tmp_path / "all") and not partial_of(tmp_path / "out").exists()


def test_it_goes_on_where_it_was(nodes, source, tmp_path):
    whole = convert(source, tmp_path / "whole", **SIZE)
    kept = convert(source, tmp_path / "out", part="1/2", **SIZE).files
    assert 0 < len(kept) < len(whole.plan.shards)
    assert convert(source, tmp_path / "out", engine="ray", **SIZE).resumed > 0
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")


def test_calibrated(nodes, source, tmp_path):
    (tmp_path / "text").write_text("w1 w2 w3 w4 w5 w6 w7 w8 w9 w10 " * 8)
    options = {"max_shard_size": "20KB", "calibrate": tmp_path / "text", "outlier_columns": 3}
    convert(source, tmp_path / "whole", **options)
    convert(source, tmp_path / "out", engine="ray", **options)
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")


def test_to_a_store(nodes, source, tmp_path, monkeypatch):
    """A folder that all nodes see, used as a store: with one file already there, and after an error."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))  # of this process; the nodes have theirs
    (tmp_path / "text").write_text("w1 w2 w3 w4 w5 w6 w7 w8 w9 w10 " * 8)
    out = f"local://{tmp_path}/out"
    for options in ({}, {"calibrate": tmp_path / "text", "outlier_columns": 3}):
        whole = convert(source, tmp_path / "whole", overwrite=True, **SIZE, **options)
        first = len(convert(source, out, part="1/4", **SIZE, **options).files)
        done = convert(source, out, engine="ray", **SIZE, **options)
        assert 0 < first < len(whole.plan.shards) and 0 < done.resumed < len(whole.plan.checkpoint.tensors)
        assert digests(tmp_path / "out") == digests(tmp_path / "whole") and verify(tmp_path / "out")
        assert done.manifest == whole.manifest and done.errors == whole.errors and str(done.out) == out
        with pytest.raises(OutputError, match="exists, and a store cannot replace an artifact"):
            convert(source, out, engine="ray", **SIZE)
        shutil.rmtree(tmp_path / "out")
    convert(source, out, threshold=5.0, part="2/3", **SIZE)
    with pytest.raises(OutputError, match="unfinished conversion with another recipe") as caught:
        convert(source, out, engine="ray", **SIZE)
    assert "\n" not in str(caught.value)
    convert(source, out, engine="ray", overwrite=True, **SIZE)
    convert(source, tmp_path / "whole", overwrite=True, **SIZE)
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")


@pytest.mark.parametrize("calibrated", [False, True])
def test_a_worker_plans_once_for_all_its_tasks(calibrated, source, tmp_path, monkeypatch):
    """Also where a text is involved; and again when the source changes."""
    (tmp_path / "text").write_text("w1 w2 w3 w4 w5 w6 w7 w8 w9 w10 " * 8)
    given = {"calibrate": str(tmp_path / "text")} if calibrated else {}
    options, calls = ConvertOptions(source, **SIZE, **given), []
    monkeypatch.setattr(module, "make_plan", lambda *given: calls.append(given) or make_plan(*given))

    def write_all(out):
        plan = make_plan(options)
        task = module._Task(options.absolute(), LocalFolder(out), module.Nodes(), None, plan.decisions())
        for number in range(1, len(plan.units) + 1):
            module._write(task, number, False)
        finalize(out)
        return len(plan.units)

    assert write_all(tmp_path / "out") > len(calls) == 1
    convert(source, tmp_path / "whole", **SIZE, **given)
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")
    calls.clear()
    llama(tmp_path / "other", shards=2, layers=3)
    for path in (tmp_path / "other").iterdir():
        path.replace(tmp_path / "source" / path.name)
    write_all(tmp_path / "second")
    convert(source, tmp_path / "third", **SIZE, **given)
    assert calls and digests(tmp_path / "second") == digests(tmp_path / "third")


def command_of(nodes, source: str, out: Path) -> list[str]:
    words = [sys.executable, "-m", "quantize8", "convert", source, "--out", str(out), "--max-shard-size", "6KB"]
    return [*words, "--engine", "ray", "--address", nodes.address, "--json"]


def test_a_node_that_is_killed(nodes, source, tmp_path):
    """When the first weight file is whole and each node waits for a file held by this process: another continues."""
    import ray

    files = [shard.file for shard in convert(source, tmp_path / "whole", **SIZE).plan.shards]
    partial = partial_of(tmp_path / "out")
    partial.mkdir()
    held = [Journal(partial / f"{file}{SUFFIX}") for file in files[1:]]
    command = command_of(nodes, source, tmp_path / "out")
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            while not (partial / "files" / files[0]).exists() or ray.available_resources().get("CPU"):
                assert process.poll() is None
                time.sleep(0.05)
            nodes.remove_node(next(iter(nodes.worker_nodes)), allow_graceful=False)
        finally:
            for journal in held:
                journal.close()
        output = process.communicate()[0]
    nodes.add_node(**SMALL)
    assert process.returncode == 0 and json.loads(output)["out"] == str(tmp_path / "out")
    assert digests(tmp_path / "out") == digests(tmp_path / "whole") and verify(tmp_path / "out")


def test_an_error_of_the_users_is_raised_as_it_is(nodes, tmp_path):
    def spoil(state):
        state["model.norm.weight"][3] = float("nan")

    source = str(llama(tmp_path / "source", shards=2, edit=spoil))
    with pytest.raises(WeightError, match="norm") as caught:
        convert(source, tmp_path / "out", engine="ray", **SIZE)
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()


def test_an_address_where_no_cluster_is(nodes, source, tmp_path):
    command = command_of(nodes, source, tmp_path / "out")
    command[command.index(nodes.address)] = "127.0.0.1:9"
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and "no Ray cluster can be used there" in done.stderr
    assert not done.stdout and not partial_of(tmp_path / "out").exists()


def test_a_node_that_decides_otherwise_does_not_write(nodes, source, tmp_path, monkeypatch):
    monkeypatch.setattr("quantize8.conversion.plan.__version__", "99")  # here, and not in the workers
    with pytest.raises(OutputError, match=r"this node has version 0\..*install the same quantize8 on all nodes"):
        convert(source, tmp_path / "out", engine="ray", overwrite=True, **SIZE)
    assert not partial_of(tmp_path / "out").exists()


def test_what_no_node_has(nodes, source, tmp_path, monkeypatch):
    with pytest.raises(OutputError, match="workers 0: must be"):
        convert(source, tmp_path / "out", engine="ray", workers=0)
    monkeypatch.setattr(module, "_LOOK", 0.1)
    monkeypatch.setattr(module, "_PATIENCE", 0.3)
    with pytest.raises(OutputError, match="no node of the cluster has 64 CPU; add one"):
        convert(source, tmp_path / "out", engine="ray", workers=64, **SIZE)
    assert not partial_of(tmp_path / "out").exists()


def test_options_that_do_not_go_together(source, tmp_path, monkeypatch):
    for options, message in [
        ({"engine": "spark"}, "engine spark: unknown"),
        ({"address": "auto"}, "add --engine ray"),
        ({"engine": "ray", "part": "1/2"}, "leave out --part"),
    ]:
        with pytest.raises(OutputError, match=message) as caught:
            convert(source, tmp_path / "out", **options)
        assert "\n" not in str(caught.value)
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(DependencyError, match=r"pip install 'quantize8\[ray\]'"):
        convert(source, tmp_path / "out", engine="ray")
    assert not partial_of(tmp_path / "out").exists()
