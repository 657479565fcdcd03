"""How well a model predicts a text: perplexity over windows of a fixed context."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from quantize8.errors import SourceError

DEFAULT_CONTEXT = 1024  # tokens; long enough that the first tokens of a window do not dominate


@dataclass(frozen=True)
class Perplexity:
    """exp of the mean negative log-likelihood (natural log) of the scored tokens."""

    perplexity: float
    scored: int  # tokens; the first of each window has nothing before it, and is not scored


def perplexity(model: Any, ids: Any, context: int = DEFAULT_CONTEXT) -> Perplexity:
    """Perplexity of a causal model on token ids [T], in windows of `context` tokens that do not overlap.

    Logits are taken to float32 before the softmax. Raises SourceError where there are fewer than two tokens.
    """
    import torch

    total, scored = 0.0, 0
    with torch.inference_mode():
        for start in range(0, len(ids) - 1, context):
            window = ids[start : start + context].to(model.device)
            if len(window) < 2:
                break
            logits = model(window[None]).logits[0, :-1].float()
            total += float(torch.nn.functional.cross_entropy(logits, window[1:], reduction="sum"))
            scored += len(window) - 1
    if not scored:
        raise SourceError("text: holds fewer than two tokens; give a longer one")
    return Perplexity(math.exp(total / scored), scored)
