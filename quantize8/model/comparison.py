"""What a check of an artifact found, in plain numbers."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Check:
    """What a check of an artifact found; one that is broken raises ArtifactError instead."""

    parameters: int = 0  # that were compared
    tokens: int = 0  # that went through both models
    error: float | None = None  # ||y - y_source|| / ||y_source|| of the logits, or of the last hidden state
    kl: float | None = None  # KL(source || artifact) of the logits, nats a token, mean
    top1: float | None = None  # share of tokens at which both find the same logit the largest
    overflow: str | None = None  # module whose output float16 cannot hold, where that is the model's dtype
    skipped: str | None = None  # what was not checked, and why
    seconds: float = 0.0
