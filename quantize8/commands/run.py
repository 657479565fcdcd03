"""Generate text greedily as a quick check of a model, and compare it with the checkpoint that it was made from."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from quantize8.calibration.scoring import compare_continuation
from quantize8.calibration.text import open_for_text
from quantize8.errors import SourceError
from quantize8.kernels.reference import OutlierMode
from quantize8.memory import peak_rss
from quantize8.runtime.loading import quiet

DEFAULT_PROMPT = "The capital of France is"
DEFAULT_NEW_TOKENS = 64


@dataclass(frozen=True)
class Generation:
    """One greedy continuation and its speed."""

    model: str
    text: str  # the continuation, without the prompt
    tokens: list[int]
    prompt_tokens: int
    prefill_tokens_per_s: float
    decode_tokens_per_s: float  # 0 if a single token was generated
    weight_bytes: int  # parameters and buffers
    peak_rss_bytes: int  # of this process so far


@dataclass(frozen=True)
class Agreement:
    """How close the model's predictions are to the source's, at each token of the source's continuation."""

    tokens: int  # number of tokens compared
    kl: float  # mean KL(source || model) in nats per token
    top1: float  # share of tokens for which both models rank the same token first


@dataclass(frozen=True)
class Comparison:
    """The continuations of a model and of its source for the same prompt."""

    generation: Generation
    source: Generation
    first_difference: int | None  # index of the first token that differs; None if all are equal
    agreement: Agreement | None = None  # None if tokenizers or vocabularies differ, and for encoder-decoder models


def run(
    model: str,
    prompt: str = DEFAULT_PROMPT,
    *,
    max_new_tokens: int = DEFAULT_NEW_TOKENS,
    compare: str | None = None,
    device: str = "auto",
    mode: OutlierMode | None = None,
    chat: bool = False,
    revision: str | None = None,
    token: str | None = None,
    on_text: Callable[[str], None] | None = None,
) -> Generation | Comparison:
    """Continue a prompt greedily with an artifact or any other checkpoint.

    With `compare`, the source continues the prompt as well, and then both models are scored on the source's
    continuation, token by token. Both models are in memory at the same time.

    Args:
        model: A checkpoint or artifact: a folder, a GGUF file or a hub id.
        prompt: Text to continue.
        max_new_tokens: Maximum number of tokens to generate.
        compare: The source to run and compare with: a folder, a GGUF file or a hub id.
        device: "auto", "cpu" or "cuda".
        mode: Outlier handling, as in `quantize8.load`.
        chat: Apply the model's chat template to the prompt.
        revision: Branch, tag or commit of `model` on the hub.
        token: Hub token. None uses the one that `hf auth login` stored.
        on_text: Called with each piece of the continuation of `model` as it is generated.

    Returns:
        A `Generation`, or with `compare` a `Comparison`.

    Raises:
        SourceError: A model cannot be opened or does not generate text.
    """
    loaded, tokenizer = open_for_text(model, device, mode, revision, token)
    first = generate(model, loaded, tokenizer, prompt, max_new_tokens, chat, on_text)
    if compare is None:
        return first
    other, its_tokenizer = open_for_text(compare, device, mode, token=token)
    second = generate(compare, other, its_tokenizer, prompt, max_new_tokens, chat)
    prompts = [_encode(each, prompt, chat)[0] for each in (tokenizer, its_tokenizer)]
    return replace(compared(first, second), agreement=_agreement(loaded, other, prompts, second.tokens))


def generate(
    name: str,
    model: Any,
    tokenizer: Any,
    prompt: str,
    max_new_tokens: int,
    chat: bool = False,
    on_text: Callable[[str], None] | None = None,
) -> Generation:
    """Continue a prompt greedily with a loaded model, and measure its speed.

    Args:
        name: What the result calls the model.
        model: A transformers model.
        tokenizer: Its tokenizer.
        prompt: Text to continue.
        max_new_tokens: Maximum number of tokens to generate.
        chat: Apply the model's chat template to the prompt.
        on_text: Called with each piece of the continuation as it is generated.

    Raises:
        SourceError: The prompt is empty, `max_new_tokens` is below 1, or the model has no chat template for `chat`.
    """
    import torch
    from transformers import TextStreamer

    from quantize8.runtime.cache import preallocated_cache

    class Timed(TextStreamer):  # type: ignore[misc]
        """Records the time of each token; the first entry is the prompt."""

        def put(self, value: Any) -> None:
            times.append(time.perf_counter())
            super().put(value)

        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            if on_text is not None:
                on_text(text)

    if max_new_tokens < 1:
        raise SourceError(f"max-new-tokens {max_new_tokens}: must be 1 or more")
    ids = _encode(tokenizer, prompt, chat).to(model.device)
    times: list[float] = []
    with quiet(), torch.inference_mode():
        output = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            past_key_values=preallocated_cache(model, ids.shape[1] + max_new_tokens),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            temperature=None,
            top_p=None,
            top_k=None,
            pad_token_id=tokenizer.eos_token_id,
            streamer=Timed(tokenizer, skip_prompt=True, skip_special_tokens=True),
        )
    tokens = output[0, ids.shape[1] :].tolist()
    prompted, first, last = times[0], times[1], times[len(tokens)]
    tensors = [*model.parameters(), *model.buffers()]
    return Generation(
        model=name,
        text=tokenizer.decode(tokens, skip_special_tokens=True),
        tokens=tokens,
        prompt_tokens=ids.shape[1],
        prefill_tokens_per_s=ids.shape[1] / (first - prompted),
        decode_tokens_per_s=(len(tokens) - 1) / (last - first) if len(tokens) > 1 else 0.0,
        weight_bytes=sum(tensor.numel() * tensor.element_size() for tensor in tensors),
        peak_rss_bytes=peak_rss(),
    )


def compared(generation: Generation, source: Generation) -> Comparison:
    """Compare two continuations of the same prompt: the first token that differs."""
    pairs = zip(generation.tokens, source.tokens, strict=False)
    first_difference = next((i for i, (ours, theirs) in enumerate(pairs) if ours != theirs), None)
    if first_difference is None and len(generation.tokens) != len(source.tokens):
        first_difference = min(len(generation.tokens), len(source.tokens))
    return Comparison(generation, source, first_difference)


def _agreement(model: Any, source: Any, prompts: list[Any], tokens: list[int]) -> Agreement | None:
    """Score both models on the source's continuation of the prompt [P], in one pass each; None if not comparable."""
    import torch

    sizes = {each.config.get_text_config().vocab_size for each in (model, source)}
    if model.config.is_encoder_decoder or len(sizes) > 1 or not prompts[0].equal(prompts[1]):
        return None
    ids = torch.cat([prompts[0], torch.tensor(tokens)])
    pairs = compare_continuation(model, source, ids, len(prompts[0]))
    return Agreement(len(pairs.kl), float(pairs.kl.mean()), float(pairs.same_top1.mean()))


def _encode(tokenizer: Any, prompt: str, chat: bool) -> Any:
    if not chat:
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    elif tokenizer.chat_template is None:
        raise SourceError("chat: the model has no chat template; leave out --chat")
    else:
        message = [{"role": "user", "content": prompt}]
        ids = tokenizer.apply_chat_template(message, add_generation_prompt=True, return_tensors="pt")["input_ids"]
    if not ids.numel():
        raise SourceError("prompt: is empty; give a text to continue")
    return ids
