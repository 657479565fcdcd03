"""Longer runs of the targets in helpers/fuzzing.py, guided by coverage (`pip install --group fuzz`), and of bit flips.

    python -m tests.fuzz READER --runs 1000000 --corpus corpus
    python -m tests.fuzz flips --runs 1000

An input that fails is saved in the folder `findings`. The executions are added to tests/corpus/executions.json.
"""

import argparse
import fcntl
import json
import os
import random
import sys
import tempfile
from pathlib import Path

_GUIDES = (
    "quantize8.sources", "quantize8.artifact", "quantize8.conversion", "quantize8.destinations", "quantize8.formats",
    "quantize8.recipe", "quantize8.limits",
)  # fmt: skip
_EVERY = 1000  # executions, after which they are counted


def count(name: str, more: int) -> None:
    """Add to the executions of a reader; several runs may do so at the same time."""
    from tests.helpers.fuzzing import EXECUTIONS

    with EXECUTIONS.open("a+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        counts = json.loads(file.read() or "{}")
        counts[name] = counts.get(name, 0) + more
        file.truncate(0)
        file.write(json.dumps(dict(sorted(counts.items())), indent=1) + "\n")


def fuzz(name: str, runs: int, seconds: int, corpus: Path) -> None:
    """Run atheris on a reader. This ends the process."""
    import atheris
    import torch  # noqa: F401 - before what is instrumented imports it, and thousands of modules with it
    import transformers  # noqa: F401

    findings = Path("findings")
    for place in (corpus, findings):
        place.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f"fuzz-{name}-", dir="/dev/shm"))
    with atheris.instrument_imports(include=[*_GUIDES, "tomllib"]):
        from tests import fuzzing

        reader = fuzzing.READERS[name]
        for i, seed in enumerate(reader.seeds()):
            (corpus / f"seed-{i}").write_bytes(seed)
            fuzzing.attempt(name, seed, folder)  # imports what it needs, before a limit of time counts
    done = 0

    def one(data: bytes) -> None:
        nonlocal done
        done += 1
        if done % _EVERY == 0:
            count(name, _EVERY)
        fuzzing.attempt(name, data, folder)

    def changed(data: bytes, limit: int, seed: int) -> bytes:
        rng = random.Random(seed)
        return (atheris.Mutate(data, limit) if rng.random() < 0.25 else reader.mutate(data, rng))[:limit]

    options = [f"-runs={runs}", f"-max_total_time={seconds}", "-timeout=10", "-rss_limit_mb=4096", "-max_len=8192"]
    places = [str(corpus), *([str(fuzzing.CORPUS / name)] if (fuzzing.CORPUS / name).is_dir() else [])]
    atheris.Setup(["fuzz", *options, f"-artifact_prefix={findings}/{name}-", *places], one, custom_mutator=changed)
    atheris.Fuzz()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", help="a reader, or flips")
    parser.add_argument("--runs", type=int, default=1_000_000)
    parser.add_argument("--seconds", type=int, default=0, help="stop earlier; 0 for no limit")
    parser.add_argument("--corpus", type=Path, default=Path("corpus"), help="inputs that reach new code, by reader")
    options = parser.parse_args()
    sys.path.insert(0, str(Path(__file__).parent))
    os.environ["HF_HUB_OFFLINE"] = "1"
    if options.what == "flips":
        from tests.helpers.flipping import flip_all

        print(flip_all(options.runs))
        return
    fuzz(options.what, options.runs, options.seconds, options.corpus / options.what)


if __name__ == "__main__":
    main()
