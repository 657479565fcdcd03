"""Generating: real text from a real artifact, the figures reported with it, and comparison with the source."""

import pytest
import torch
from helpers.making import llama, word_tokenizer

from quantize8 import DependencyError, SourceError, convert, load, run
from quantize8.calibration.text import open_for_text
from quantize8.commands.run import Comparison, Generation, compared

PROMPT = "The capital of France is"


def test_the_artifact_continues_a_prompt_sensibly(smollm2_int8):
    pieces = []
    result = run(str(smollm2_int8), PROMPT, max_new_tokens=8, on_text=pieces.append)
    assert isinstance(result, Generation)
    assert result.text.startswith(" Paris") and "".join(pieces).strip() == result.text.strip()
    assert len(result.tokens) == 8 and result.prompt_tokens == 5
    assert result.prefill_tokens_per_s > 0 and result.decode_tokens_per_s > 0
    # 106.2 M int8 weights with their scales, and the embedding and norms, in float32 on a CPU
    assert 106.2e6 + 4 * 28.3e6 < result.weight_bytes < 230e6 < result.peak_rss_bytes


def test_greedy_tokens_equal_those_of_transformers_own_loop(smollm2_int8):
    model, tokenizer = open_for_text(str(smollm2_int8), "cpu")
    ids = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    with torch.inference_mode():
        for _ in range(8):
            ids = torch.cat([ids, model(ids).logits[:, -1].argmax(-1, keepdim=True)], 1)
    assert run(str(smollm2_int8), PROMPT, max_new_tokens=8).tokens == ids[0, 5:].tolist()


def test_compare_runs_the_source_and_finds_where_they_part(smollm2_int8, smollm2_gguf):
    result = run(str(smollm2_int8), PROMPT, max_new_tokens=12, compare=str(smollm2_gguf))
    assert isinstance(result, Comparison)
    ours, theirs = result.generation.tokens, result.source.tokens
    assert result.source.text.startswith(" Paris")
    assert result.agreement.tokens == 12 and 0 < result.agreement.kl < 0.1 and result.agreement.top1 > 0.7
    part = result.first_difference
    if part is None:
        assert ours == theirs
    else:
        assert ours[:part] == theirs[:part] and ours[part] != theirs[part]


def test_compare_scores_the_sources_continuation_by_both_models(tmp_path):
    source = word_tokenizer(llama(tmp_path / "source", dtype=torch.float32))
    convert(str(source), tmp_path / "int8")
    prompt = " ".join(f"w{i}" for i in range(20))
    found = run(str(tmp_path / "int8"), prompt, max_new_tokens=12, compare=str(source), device="cpu")
    logs = []
    for folder in (tmp_path / "int8", source):
        model, tokenizer = load(folder, "cpu")
        ids = tokenizer(prompt)["input_ids"] + found.source.tokens
        with torch.inference_mode():
            logs.append(model(torch.tensor([ids])).logits[0, 19:-1].double().log_softmax(-1))
    (q, p), count = logs, len(found.source.tokens)
    assert found.agreement.tokens == count == len(p)
    assert 0 < found.agreement.kl == pytest.approx(float((p.exp() * (p - q)).sum() / count), rel=1e-3)
    assert found.agreement.top1 == float((p.argmax(-1) == q.argmax(-1)).double().mean())
    itself = run(str(source), prompt, max_new_tokens=3, compare=str(source), device="cpu").agreement
    assert (itself.tokens, itself.kl, itself.top1) == (3, 0, 1)


def test_models_of_different_tokenizers_are_compared_by_text_alone(tmp_path):
    first = word_tokenizer(llama(tmp_path / "first", dtype=torch.float32))
    other = word_tokenizer(llama(tmp_path / "other", dtype=torch.float32), 40)
    found = run(str(first), "w1 w50", max_new_tokens=2, compare=str(other), device="cpu")
    assert found.agreement is None and len(found.source.tokens) == 2


def generation(*tokens: int) -> Generation:
    return Generation("m", "", list(tokens), 1, 1.0, 1.0, 0, 0)


@pytest.mark.parametrize(
    ("ours", "theirs", "part"),
    [((1, 2, 3), (1, 2, 3), None), ((1, 2, 3), (1, 9, 3), 1), ((1,), (1, 2), 1), ((1, 2), (1,), 1), ((5,), (6,), 0)],
)
def test_where_two_generations_part(ours, theirs, part):
    assert compared(generation(*ours), generation(*theirs)).first_difference == part


def test_chat_uses_the_template(smollm2_int8):
    result = run(str(smollm2_int8), "What is gravity?", max_new_tokens=12, chat=True)
    assert result.prompt_tokens > 20 and "ravity" in result.text


def test_a_single_token_has_no_decode_rate(smollm2_int8):
    assert run(str(smollm2_int8), PROMPT, max_new_tokens=1).decode_tokens_per_s == 0.0


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"max_new_tokens": 0}, SourceError, "must be 1 or more"),
        ({"prompt": ""}, SourceError, "is empty"),
        ({"device": "cuda"}, DependencyError, "use --device cpu"),
        ({"device": "tpu"}, DependencyError, "unknown"),
    ],
)
def test_what_cannot_be_run_is_said_in_one_line(smollm2_int8, options, error, message):
    with pytest.raises(error, match=message):
        run(str(smollm2_int8), **options)


def test_models_that_do_not_take_or_give_text(mgm, minilm, tmp_path):
    with pytest.raises(SourceError, match="has no tokenizer"):
        run(str(mgm))
    with pytest.raises(SourceError, match="BertModel, which does not generate"):
        run(str(minilm))


def test_chat_without_a_template(smollm2_int8, monkeypatch):
    monkeypatch.setattr("transformers.PreTrainedTokenizerBase.chat_template", None, raising=False)
    model, tokenizer = open_for_text(str(smollm2_int8), "cpu")
    tokenizer.chat_template = None
    from quantize8.commands.run import generate

    with pytest.raises(SourceError, match="no chat template"):
        generate("m", model, tokenizer, "x", 1, chat=True)


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [("{broken", SourceError, "not readable as JSON"), ('{"model": 1}', DependencyError, "tokenizer does not load")],
    ids=["no JSON", "no tokenizer"],
)
def test_a_broken_tokenizer_is_said_in_one_line(text, error, message, tmp_path):
    source = llama(tmp_path / "source")
    (source / "tokenizer.json").write_text(text)
    convert(str(source), tmp_path / "out")
    with pytest.raises(error, match=message) as caught:
        run(str(tmp_path / "out"))
    assert "\n" not in str(caught.value)
