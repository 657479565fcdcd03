"""What a check of an artifact found, in plain numbers."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Check:
    """The result of checking an artifact that is not broken; a broken one raises ArtifactError instead."""

    parameters: int = 0  # number of parameters that were compared
    tokens: int = 0  # number of tokens that went through both models
    error: float | None = None  # ||y - y_source|| / ||y_source|| of the logits, or of the last hidden state
    kl: float | None = None  # KL(source || artifact) of the logits, mean over tokens, in nats
    top1: float | None = None  # share of tokens at which the largest logit of both models is the same
    overflow: str | None = None  # a module whose output exceeds float16, if that is the model's dtype
    skipped: str | None = None  # what was not checked, and why
    seconds: float = 0.0
