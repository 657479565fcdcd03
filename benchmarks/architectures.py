"""Every architecture of transformers, as a tiny model: converted, and opened by transformers and by `quantize8.load`.

    python -m benchmarks.architectures [TYPE...]

A model type is built from its own settings, shrunk. Its artifacts are opened with transformers' own loader, through
bitsandbytes or compressed-tensors, and with `quantize8.load`, and their outputs compared with those of the float model.
Each batch of types runs in a process of its own, so that a crash or a hang costs one type. Rows are appended to a file
as they are finished: a run that was stopped continues. The results are benchmarks/results/architectures.json and the
tables of docs/architectures.md.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.architectures_table import filled, summary
from benchmarks.cpu import RESULTS, write

SECONDS = 120  # that a type may take
MEMORY = 12 * 2**30  # address space of a worker
BATCH = 40  # types per process


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("types", nargs="*", help="only these model types; results of the others stay")
    parser.add_argument("--rows", type=Path, default=Path("architectures.jsonl"), help="where rows are collected")
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.work:
        work(given.types, given.rows)
        return
    from benchmarks.architectures_models import subjects

    names = [subject.model_type for subject in subjects()]
    wanted = given.types or names
    if given.types:
        keep(given.rows, lambda row: row["model_type"] not in wanted)
    while pending := [name for name in wanted if name not in read(given.rows)]:
        print(f"{len(pending)} to go", flush=True)
        batch(pending[:BATCH], given.rows)
    rows = read(given.rows)
    path = RESULTS / "architectures.json"
    before = {row["model_type"]: row for row in json.loads(path.read_text())["rows"]} if path.exists() else {}
    found = before | rows
    ordered = [found[name] for name in names if name in found]
    print("\n".join(summary(ordered)))
    write("architectures", {"rows": []})
    about = path.read_text().replace('"rows": []', '"rows": [\n ROWS\n ]')
    path.write_text(about.replace("ROWS", ",\n ".join(json.dumps(row, separators=(",", ":")) for row in ordered)))
    page = Path(__file__).parent.parent / "docs" / "architectures.md"
    page.write_text(filled(page.read_text(), ordered))
    print(f"written to {path} and {page}")


def read(path: Path) -> dict[str, dict[str, Any]]:
    """The rows that are finished, by model type."""
    lines = path.read_text().splitlines() if path.exists() else []
    return {row["model_type"]: row for row in map(json.loads, lines)}


def keep(path: Path, wanted: Any) -> None:
    """Keep only some of the finished rows."""
    rows = [row for row in read(path).values() if wanted(row)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def append(path: Path, row: dict[str, Any]) -> None:
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")


def batch(types: list[str], rows: Path) -> None:
    """Run types in a process; one during which it ends or hangs gets a row that says so."""
    command = [sys.executable, "-m", "benchmarks.architectures", "--work", "--rows", str(rows), *types]
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=os.environ)
        done, since = len(read(rows)), time.monotonic()
        while process.poll() is None:
            time.sleep(0.5)
            if (now := len(read(rows))) != done:
                done, since = now, time.monotonic()
            if time.monotonic() - since > SECONDS:
                process.kill()
                process.wait()
        if process.returncode:
            log.seek(0)
            lines = log.read().decode(errors="replace").strip().splitlines() or [""]
            lost = next(name for name in types if name not in read(rows))
            reason = f"more than {SECONDS} s" if process.returncode == -9 else lines[-1][:300]
            append(rows, {"model_type": lost, "verdict": "crashed", "reason": reason})


def work(types: list[str], rows: Path) -> None:
    """In the process of a batch."""
    import resource

    from benchmarks.architectures_models import subjects
    from benchmarks.architectures_trial import trial

    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    for subject in subjects():
        if subject.model_type in types:
            with tempfile.TemporaryDirectory() as folder:
                append(rows, trial(subject, Path(folder) / "work"))


if __name__ == "__main__":
    main()
