"""Fault injection: kills conversions at random moments and fills disks, and checks what is left and that runs resume.

Each conversion is a process that is killed with SIGKILL at a random moment between its first and last step; some are
killed several times. After each kill, loaders must not be able to open anything except a complete artifact, and the
same command must then produce the same bytes as an undisturbed run. Each full disk is a tmpfs of a different size
(mounting needs root), on which a conversion must stop with a one-line error; once the disk is enlarged, it must resume.
Prints one line per failure; the exit code is 1 if there are any.

Run: python -m benchmarks.faults [--kills 100] [--stores 20] [--disks 20] [--seed 0] [--folder FOLDER]
"""

from __future__ import annotations

import argparse
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from unittest import mock

from quantize8.artifact.manifest import MANIFEST_NAME
from quantize8.commands.convert import convert
from quantize8.commands.verify import verify
from quantize8.destinations.local import partial_of
from quantize8.errors import OutputError
from tests.helpers.artifacts import digests, opens

SHARD_SIZE = "8MB"  # splits the model below into several files
WARMED = """
import sys
from quantize8.kernels.cpu import CpuQuantizer
from quantize8.commands.convert import convert
import numpy as np
from quantize8.kernels.cpu import quantize_rowwise
from quantize8.kernels.reference import ColumnStats
quantize_rowwise(np.ones((64, 64), np.float16), ColumnStats.empty(64))  # compiled before the clock starts
print("ready", flush=True)
sys.stdin.readline()
convert(sys.argv[1], sys.argv[2], max_shard_size=sys.argv[3], workers=2)
print("done", flush=True)
"""


def main() -> None:
    """Make a model, run all series of faults, and print the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--stores", type=int, default=20, help="conversions to a store that are killed")
    parser.add_argument("--disks", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=None, help="where to work (default: a temporary folder)")
    chosen = parser.parse_args()
    failures: list[str] = []
    with tempfile.TemporaryDirectory(dir=chosen.folder) as name:
        from benchmarks.checkpoints import make_llama

        folder = Path(name)
        make_llama(folder / "source", hidden=512, inner=1408, layers=16, vocabulary=512, shards=2)
        convert(str(folder / "source"), folder / "whole", max_shard_size=SHARD_SIZE)
        found, random_moments = Counter[str](), random.Random(chosen.seed)
        seconds = length_of(folder / "source", folder / "timed")
        for i in range(chosen.kills):
            times = random_moments.choice([1, 1, 2, 3])
            moments = [random_moments.uniform(0, 1.1 * seconds) for _ in range(times)]
            try:
                found += kill_and_resume(folder / "source", folder / "whole", folder / "out", moments)
            except AssertionError as error:
                failures.append(f"kill {i} at {moments}: {error}")
            shutil.rmtree(folder / "out", ignore_errors=True)
        kills = sum(found[state] for state in ("absent", "resumable", "complete"))
        print(f"{kills} kills in {chosen.kills} conversions of {seconds:.2f} s: {dict(found)}")
        found = Counter[str]()
        for i in range(chosen.stores):
            moments = [random_moments.uniform(0, 1.1 * seconds) for _ in range(3)]
            try:
                found += kill_and_resume_to_a_store(folder / "source", folder / "whole", folder / "store", moments)
            except AssertionError as error:
                failures.append(f"store {i}, killed at {moments}: {error}")
            shutil.rmtree(folder / "store", ignore_errors=True)
        print(f"{chosen.stores} conversions to a store: {dict(found)}")
        if chosen.disks:
            found = fill_disks(folder / "source", folder / "whole", folder / "disk", chosen.disks, failures)
            print(f"{chosen.disks} full disks: {dict(found)}")
    print("\n".join(failures) or "no failure")
    sys.exit(bool(failures))


def length_of(source: Path, out: Path) -> float:
    """Measure the seconds of an undisturbed conversion, in a process like those that are killed."""
    process, start = begin(source, out), time.perf_counter()
    assert process.stdout and process.stdout.readline() == b"done\n"
    seconds = time.perf_counter() - start
    process.communicate()
    shutil.rmtree(out)
    return seconds


def kill_and_resume(source: Path, whole: Path, out: Path, moments: list[float]) -> Counter[str]:
    """Kill a conversion repeatedly, then let it finish.

    Args:
        source: The checkpoint.
        whole: The artifact of an undisturbed conversion.
        out: Where to write the artifact.
        moments: Seconds after which each run is killed.

    Returns:
        Counts of the states after the kills, and of the resumed tensors.

    Raises:
        AssertionError: A loader opens something incomplete, or the artifact differs from `whole`.
    """
    found = Counter[str]()
    before = digests(source)
    for seconds in moments:
        begin_and_kill(source, out, seconds)
        state = state_of(out)
        found[state] += 1
        if state == "complete":
            break
    if not out.exists():
        found["tensors kept"] += convert(str(source), out, max_shard_size=SHARD_SIZE).resumed
    assert digests(out) == digests(whole), "the artifact differs"
    assert digests(source) == before, "the source differs"
    leftovers = partial_of(out)
    assert not (leftovers / "files").exists(), "unfinished files are left beside the artifact"
    shutil.rmtree(leftovers, ignore_errors=True)  # left if it was killed between moving the artifact and its last step
    return found


def kill_and_resume_to_a_store(source: Path, whole: Path, out: Path, moments: list[float]) -> Counter[str]:
    """Like `kill_and_resume`, with a folder as the store. Files are copied there, so kills also truncate them."""
    found, address, expected = Counter[str](), f"local://{out}", digests(whole)
    for seconds in moments:
        begin_and_kill(source, address, seconds)
        there = digests(out)
        if there == expected:
            found["complete"] += 1
            break
        found["unfinished"] += 1
        if there.get("config.json") == expected["config.json"]:
            found["of these in the end"] += 1
            lacks = {name for name in expected if there.get(name) != expected[name]}
            assert lacks <= {MANIFEST_NAME}, f"config.json is there before {lacks}"
        else:
            assert not opens(out), "a loader opens it"
    with suppress(OutputError):  # raised if it is complete; this run then removes the leftovers
        found["tensors kept"] += convert(str(source), address, max_shard_size=SHARD_SIZE).resumed
    assert digests(out) == expected, "the artifact differs"
    return found


def begin_and_kill(source: Path, out: Path | str, seconds: float) -> None:
    """Start a conversion, and kill it after `seconds`."""
    process = begin(source, out)
    time.sleep(seconds)
    process.send_signal(signal.SIGKILL)
    process.communicate()


def state_of(out: Path) -> str:
    """The state after a kill: absent, resumable or complete. Raises AssertionError if a loader opens a partial one."""
    if out.exists():
        verify(out)
        return "complete"
    for folder in (out, partial_of(out)):
        assert not opens(folder), f"a loader opens {folder.name}"
    journals = list(partial_of(out).glob("*.journal"))
    return "resumable" if any(path.stat().st_size for path in journals) else "absent"


def fill_disks(source: Path, whole: Path, disk: Path, count: int, failures: list[str]) -> Counter[str]:
    """Convert onto `count` file systems of different sizes, most of them too small, and again after enlarging them."""
    found = Counter[str]()
    output = sum(path.stat().st_size for path in whole.iterdir())
    few = count // 2  # these fail when reserving space; the others when writing journals and small files
    sizes = [output * (i + 1) // (few + 1) for i in range(few)]
    sizes += [output - 60_000 + 100_000 * i // (count - few) for i in range(count - few)]
    disk.mkdir()
    for size in sizes:
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size // 4096 * 4096}", "tmpfs", disk], check=True)
        try:
            found[_fill(source, whole, disk)] += 1
        except AssertionError as error:
            failures.append(f"disk of {size}: {error}")
        finally:
            subprocess.run(["umount", disk], check=True)
    return found


def _fill(source: Path, whole: Path, disk: Path) -> str:
    before, out, kept = digests(source), disk / "out", "nothing"
    enough = shutil._ntuple_diskusage(10**12, 0, 10**12)  # type: ignore[attr-defined]  # pretends that the disk was large enough at the start
    with mock.patch("shutil.disk_usage", lambda _: enough):
        try:
            convert(str(source), out, max_shard_size=SHARD_SIZE)
        except OutputError as error:
            assert "\n" not in str(error) and "No space left" in str(error), str(error)
            assert not out.exists() and not opens(partial_of(out)), "something is left that can be opened"
            kept = "a part" if partial_of(out).exists() else "nothing"
        else:
            kept = "all: the disk was large enough"
    if not out.exists():
        subprocess.run(["mount", "-o", "remount,size=1g", disk], check=True)
        convert(str(source), out, max_shard_size=SHARD_SIZE)
    assert digests(out) == digests(whole), "the artifact differs"
    assert digests(source) == before, "the source differs"
    return f"stopped in one line with {kept} kept, then went on" if not kept.startswith("all") else kept


def begin(source: Path, out: Path | str) -> subprocess.Popen[bytes]:
    """Start a process, wait until it has loaded everything it needs, and let it begin to convert."""
    command = [sys.executable, "-c", WARMED, str(source), str(out), SHARD_SIZE]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdin and process.stdout
    process.stdout.readline()
    process.stdin.write(b"\n")
    process.stdin.flush()
    return process


if __name__ == "__main__":
    main()
