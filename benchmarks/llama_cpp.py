"""A GGUF file in llama.cpp itself, through the package xllamacpp and its local server."""

from __future__ import annotations

import contextlib
import json
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch


class Server:
    """A model in llama.cpp, which answers as long as this object exists."""

    def __init__(self, path: Path, context: int = 256, threads: int = 2) -> None:
        import xllamacpp

        params = xllamacpp.CommonParams()
        params.model.path = str(path)
        params.n_ctx, params.n_parallel, params.verbosity = context, 1, 0
        params.warmup = params.cache_prompt = False
        params.cpuparams.n_threads = threads
        self.server = xllamacpp.Server(params)

    def ask(self, route: str, **body: Any) -> Any:
        """The JSON response of a route of the server."""
        data, kind = json.dumps(body).encode(), {"Content-Type": "application/json"}
        request = urllib.request.Request(self.server.listening_address + route, data, kind)
        with urllib.request.urlopen(request) as answer:
            return json.load(answer)

    def tokens(self, text: str, **options: Any) -> list[int]:
        """Token ids of a text, as llama.cpp tokenizes it."""
        found: list[int] = self.ask("/tokenize", content=text, **options)["tokens"]
        return found

    def logprobs(self, ids: list[int], size: int) -> torch.Tensor:
        """Of every token after `ids`, float32 [size].

        Which token is chosen does not change them, and a plain letter is: none are told after an end of text or a part
        of a character.
        """
        letter = [[self.tokens("a")[-1], 1e6]]
        answer = self.ask("/completion", prompt=ids, n_predict=1, temperature=0, n_probs=size, logit_bias=letter)
        entries = answer["completion_probabilities"][0]["top_logprobs"]
        found = {entry["id"]: entry["logprob"] for entry in entries}
        return torch.tensor([found[number] for number in range(size)])

    def speed(self, ids: list[int], steps: int) -> tuple[float, float]:
        """Tokens per second of the prompt and of the greedy steps after it, as llama.cpp measures them."""
        told = self.ask("/completion", prompt=ids, n_predict=steps, temperature=0, ignore_eos=True, cache_prompt=False)
        return told["timings"]["prompt_per_second"], told["timings"]["predicted_per_second"]


@contextlib.contextmanager
def served(path: Path, context: int = 256, threads: int = 2) -> Iterator[Server]:
    """A server during a block of code."""
    server = Server(path, context, threads)
    try:
        yield server
    finally:
        del server.server
