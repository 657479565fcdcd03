"""The functions of quantize8 that the simplest conversion runs, by module: a two-layer Llama, all defaults, one worker.

    python -m tests.helpers.trace

Functions of all threads count, but neither comprehensions nor lambdas. The model is converted once before, so that
caches are warm.
"""

import os
import sys
import tempfile
import threading
from collections import defaultdict
from pathlib import Path
from types import FrameType

sys.path[:0] = [str(Path(__file__).parent.parent)]


def traced(source: Path) -> dict[str, set[str]]:
    """Module -> the functions that converting `source` into the current folder runs."""
    import quantize8

    root, calls = Path(quantize8.__file__).parent, defaultdict[str, set[str]](set)
    convert, kept = quantize8.convert, [quantize8.convert(str(source), "warm", workers=1)]

    def profile(frame: FrameType, event: str, _: object) -> None:
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(f"{root}{os.sep}") and not code.co_name.startswith("<"):
            calls[Path(code.co_filename).relative_to(root).as_posix()].add(f"{code.co_name}:{code.co_firstlineno}")

    sys.setprofile(profile)
    threading.setprofile(profile)
    try:
        kept.append(convert(str(source), workers=1))
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
    return dict(calls)


def main() -> None:
    from test_digests import LLAMA, llama_shapes, written

    with tempfile.TemporaryDirectory() as folder:
        source = written(Path(folder) / "source", LLAMA, llama_shapes())
        os.chdir(folder)
        calls = traced(source)
        os.chdir("/")
    for module in sorted(calls):
        names = sorted(name.partition(":")[0] for name in calls[module])
        print(f"{module} ({len(names)}): {', '.join(names)}")
    print(f"{len(calls)} modules, {sum(map(len, calls.values()))} functions")


if __name__ == "__main__":
    main()
