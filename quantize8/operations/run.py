"""Generate text as a quick check of a model, and compare it with the checkpoint it was made from. Greedy."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from quantize8.errors import SourceError
from quantize8.memory import peak_rss
from quantize8.model.loading import quiet
from quantize8.model.scoring import compare_continuation
from quantize8.model.text import open_for_text
from quantize8.ops.reference import OutlierMode

DEFAULT_PROMPT = "The capital of France is"
DEFAULT_NEW_TOKENS = 64


@dataclass(frozen=True)
class Generation:
    """One greedy continuation and how fast it came."""

    model: str
    text: str  # the continuation, without the prompt
    tokens: list[int]
    prompt_tokens: int
    prefill_tokens_per_s: float
    decode_tokens_per_s: float  # 0 where a single token was generated
    weight_bytes: int  # parameters and buffers
    peak_rss_bytes: int  # of this process so far


@dataclass(frozen=True)
class Agreement:
    """How near the model's predictions are to the source's at each token of the source's continuation."""

    tokens: int
    kl: float  # KL(source || model), nats a token, mean
    top1: float  # share of tokens at which both find the same token the likeliest


@dataclass(frozen=True)
class Comparison:
    """A generation beside its source's for the same prompt."""

    generation: Generation
    source: Generation
    first_difference: int | None  # index of the first token where they part; None where they agree
    agreement: Agreement | None = None  # None for two tokenizers or vocabularies, and encoder-decoders


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
    """Continue a prompt greedily with an artifact or a plain checkpoint.

    With `compare` the source continues it, too, and both then predict the source's continuation token by token; both
    models are in memory at once.

    Args: model and compare, folders, GGUF files or hub ids; device, auto, cpu or cuda; mode, as in `load`;
    chat, put the prompt through the model's chat template; revision, of `model` on the hub; on_text, called with pieces
    of the continuation.
    Raises: SourceError where a model cannot be opened or does not generate text.
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
    """One greedy continuation by a loaded model, timed."""
    import torch
    from transformers import TextStreamer

    from quantize8.model.cache import preallocated_cache

    class Timed(TextStreamer):  # type: ignore[misc]
        """Notes when each token came, the prompt first."""

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
    """Where two continuations of the same prompt part."""
    pairs = zip(generation.tokens, source.tokens, strict=False)
    part = next((i for i, (ours, theirs) in enumerate(pairs) if ours != theirs), None)
    if part is None and len(generation.tokens) != len(source.tokens):
        part = min(len(generation.tokens), len(source.tokens))
    return Comparison(generation, source, part)


def _agreement(model: Any, source: Any, prompts: list[Any], tokens: list[int]) -> Agreement | None:
    """Both models on their prompts [P] and the source's continuation, in one pass each; None where not comparable."""
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
        raise SourceError("chat: the model has no chat template; leave --chat out")
    else:
        message = [{"role": "user", "content": prompt}]
        ids = tokenizer.apply_chat_template(message, add_generation_prompt=True, return_tensors="pt")["input_ids"]
    if not ids.numel():
        raise SourceError("prompt: is empty; give some text")
    return ids
