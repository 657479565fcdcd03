"""Evaluating: results against direct computations, intervals against simulation, errors, and a real model."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from helpers.making import llama, word_tokenizer
from test_encoders import t5

import quantize8
from quantize8 import SourceError, convert, evaluate, load
from quantize8.calibration.scoring import compare
from quantize8.commands.evaluate import _student, interval, perplexity, standard_error
from quantize8.files import TEXT

WORDS = " ".join(f"w{i * i * 7 % 63}" for i in range(300))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Folders of a tiny model and of its int8, both with a tokenizer, and a text of 300 tokens."""
    folder = tmp_path_factory.mktemp("evaluate")
    source = word_tokenizer(llama(folder / "source", dtype=torch.float32))
    convert(str(source), folder / "int8", recipe="int8-all")
    (folder / "text").write_text(WORDS)
    return str(source), str(folder / "int8"), folder / "text"


def test_windows_do_not_overlap_and_each_first_token_is_unscored(tmp_path):
    model, _ = load(llama(tmp_path / "source", dtype=torch.float32))
    ids = torch.arange(23) % 60
    total, scored = 0.0, 0
    with torch.inference_mode():
        for window in (ids[:10], ids[10:20], ids[20:]):
            log = model(window[None]).logits[0].log_softmax(-1)
            total -= sum(log[i, window[i + 1]].item() for i in range(len(window) - 1))
            scored += len(window) - 1
    result = perplexity(model, ids, context=10)
    assert result.scored == scored == 20
    assert result.perplexity == pytest.approx(math.exp(total / scored), rel=1e-5)


@pytest.mark.parametrize("count", [0, 1])
def test_too_short_a_text(count, tmp_path):
    model, _ = load(llama(tmp_path / "source", dtype=torch.float32))
    with pytest.raises(SourceError, match="fewer than two tokens"):
        perplexity(model, torch.arange(count))


def test_figures_are_those_of_the_scores(tiny):
    source, int8, text = tiny
    found = evaluate(int8, text=text, reference=source, context=50, tokens=225, layers=True, device="cpu")
    model, tokenizer = load(int8, "cpu")
    ids = tokenizer(WORDS, return_tensors="pt")["input_ids"][0][:225]
    pairs = compare(model, load(source, "cpu")[0], ids, 50, layers=True)
    assert (found.model, found.tokens, found.scored, found.context) == (int8, 225, 220, 50)
    assert found.perplexity.value == pytest.approx(math.exp(pairs.nll.mean()))
    assert found.perplexity.low < found.perplexity.value < found.perplexity.high
    agreement, kl = found.agreement, found.agreement.kl
    assert agreement.reference == source and agreement.layers == pairs.layers != {}
    assert agreement.perplexity.value == pytest.approx(math.exp(pairs.reference_nll.mean()))
    assert agreement.ratio.value == pytest.approx(found.perplexity.value / agreement.perplexity.value)
    assert agreement.ratio.high - agreement.ratio.low < 0.3 * (found.perplexity.high / found.perplexity.low - 1)
    assert agreement.top1 == pairs.same_top1.mean()
    assert kl.mean == pairs.kl.mean() > 0 and kl.max == pairs.kl.max() and kl.median == np.median(pairs.kl)
    assert kl.p99 == np.quantile(pairs.kl, 0.99) and kl.standard_error == standard_error(pairs.kl)[0]


def test_kl_by_position_averages_each_position_over_the_windows(tiny):
    source, int8, text = tiny
    options = {"text": text, "reference": source, "device": "cpu"}
    each = evaluate(int8, context=50, tokens=225, **options).agreement.kl
    assert [(entry.first, entry.tokens) for entry in each.by_position] == [
        (i, 5 if i < 25 else 4) for i in range(1, 50)
    ]
    wide = evaluate(int8, context=128, tokens=256, **options).agreement.kl
    assert [entry.first for entry in wide.by_position] == list(range(1, 128, 2)) and len(wide.by_position) == 64
    assert [entry.tokens for entry in wide.by_position] == [4] * 63 + [2]
    for kl in (each, wide):
        total = sum(entry.tokens for entry in kl.by_position)
        assert sum(entry.kl * entry.tokens for entry in kl.by_position) / total == pytest.approx(kl.mean)


def test_a_model_beside_itself_agrees_fully(tiny):
    _, int8, text = tiny
    found = evaluate(int8, text=text, reference=int8, layers=True, device="cpu")
    assert found.agreement.perplexity == found.perplexity
    assert dataclasses.astuple(found.agreement.ratio) == (1, 1, 1)
    kl = found.agreement.kl
    assert (kl.mean, kl.standard_error, kl.max, found.agreement.top1) == (0, 0, 0, 1)
    assert set(found.agreement.layers.values()) == {0}


def test_mode_and_threshold_act_on_the_model_alone(tiny):
    _, int8, text = tiny
    options = {"text": text, "reference": int8, "tokens": 100, "device": "cpu"}
    as_it_is, off = evaluate(int8, **options), evaluate(int8, threshold=0.5, mode="dynamic", **options)
    assert off.agreement.perplexity == as_it_is.perplexity and off.agreement.kl.mean > 0


def test_a_window_is_at_most_what_the_models_take(tiny, tmp_path):
    source, _, text = tiny
    assert evaluate(source, text=text).context == 128
    short = word_tokenizer(llama(tmp_path / "short", dtype=torch.float32))
    config = (
        (short / "config.json").read_text().replace('"max_position_embeddings": 128', '"max_position_embeddings": 64')
    )
    (short / "config.json").write_text(config)
    assert evaluate(source, text=text, reference=str(short)).context == 64


def test_the_first_tokens_of_a_text_are_used_and_all_of_a_short_one(tiny):
    source, _, text = tiny
    assert evaluate(source, text=text).tokens == 300
    two = evaluate(source, text=text, tokens=2)
    assert (two.tokens, two.scored, two.perplexity.low, two.perplexity.high) == (2, 1, None, None)
    assert evaluate(source, text=text, reference=source, tokens=2).agreement.kl.standard_error is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"context": 1}, "context 1: must be 2 or more"),
        ({"tokens": -5}, "tokens -5: must be 2 or more"),
        ({"tokens": 1}, "tokens 1: must be 2 or more"),
        ({"threshold": -1.0}, "threshold -1: must be 0"),
        ({"threshold": math.nan}, "threshold nan: must be 0"),
        ({"layers": True}, "layers: .*add --reference"),
        ({"text": "missing.txt"}, "missing.txt: cannot be read as text"),
        ({"reference": "missing"}, "missing"),
    ],
)
def test_arguments_that_are_wrong(tiny, options, message):
    with pytest.raises(SourceError, match=message) as caught:
        evaluate(tiny[0], **{"text": tiny[2]} | options)
    assert "\n" not in str(caught.value)


def test_texts_without_two_tokens(tiny, tmp_path):
    for content, message in (("", "is empty"), (" \n", "is empty"), ("w1", "fewer than two tokens")):
        (tmp_path / "text").write_text(content)
        with pytest.raises(SourceError, match=message):
            evaluate(tiny[0], text=tmp_path / "text")


def test_models_that_do_not_continue_a_text(mgm, minilm, tmp_path):
    with pytest.raises(SourceError, match="has no tokenizer"):
        evaluate(str(mgm))
    with pytest.raises(SourceError, match="BertModel, which does not generate"):
        evaluate(str(minilm))
    with pytest.raises(SourceError, match="is an encoder-decoder"):
        evaluate(str(word_tokenizer(t5(tmp_path / "t5")[0])))


def test_references_of_another_tokenizer_or_vocabulary(tiny, tmp_path):
    source, _, text = tiny
    fewer = word_tokenizer(llama(tmp_path / "fewer", dtype=torch.float32), 40)
    with pytest.raises(SourceError, match="fewer: its tokenizer splits the text differently"):
        evaluate(source, text=text, reference=str(fewer))

    def widen(state):
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            state[name] = torch.cat([state[name], state[name][:8]])

    wider = word_tokenizer(llama(tmp_path / "wider", dtype=torch.float32, edit=widen))
    config = (wider / "config.json").read_text().replace('"vocab_size": 64', '"vocab_size": 72')
    (wider / "config.json").write_text(config)
    with pytest.raises(SourceError, match="vocabulary has 64 tokens, the reference's 72"):
        evaluate(source, text=text, reference=str(wider))


def test_a_model_that_computes_nan(tiny, tmp_path):
    def spoil(state):
        state["model.norm.weight"][3] = math.nan

    broken = str(word_tokenizer(llama(tmp_path / "broken", dtype=torch.float32, edit=spoil)))
    with pytest.raises(SourceError, match="the model gives logits that are NaN"):
        evaluate(broken, text=tiny[2])
    with pytest.raises(SourceError, match="the reference gives logits that are NaN"):
        evaluate(tiny[0], text=tiny[2], reference=broken)


def series(generator, count, correlation):
    """A skewed, correlated series with mean exp(1/2): exp of a normal autoregressive one of order 1."""
    steps = generator.standard_normal(count + 200) * math.sqrt(1 - correlation**2)
    value, values = 0.0, []
    for step in steps.tolist():
        value = correlation * value + step
        values.append(value)
    return np.exp(values[200:])


@pytest.mark.parametrize(("correlation", "at_least"), [(0.0, 0.92), (0.5, 0.90), (0.8, 0.88)])
def test_intervals_hold_the_mean_as_often_as_they_say(correlation, at_least):
    """For 200 simulated texts of 2046 tokens; the plain standard error's intervals contain the mean far less often."""
    generator, true = np.random.default_rng(0), math.exp(0.5)
    held, held_plain = 0, 0
    for _ in range(200):
        values = series(generator, 2046, correlation)
        found = interval(values)
        held += found.low <= true <= found.high
        held_plain += abs(values.mean() - true) <= 1.96 * values.std(ddof=1) / math.sqrt(2046)
    assert at_least <= held / 200 <= 0.99
    assert held_plain / 200 < 1.05 - 0.5 * correlation


def test_the_paired_interval_is_narrower(tiny):
    """What both models find hard cancels out: the differences have a hundredth of the spread."""
    generator = np.random.default_rng(1)
    reference = series(generator, 2046, 0.5)
    nll = reference + 0.03 + 0.01 * generator.standard_normal(2046)
    paired, apart = interval(nll - reference), interval(nll)
    assert paired.low < 0.03 < paired.high and apart.high - apart.low > 50 * (paired.high - paired.low)


def test_quantiles_of_student():
    """From a table of the distribution."""
    for freedom, quantile in ((9, 2.2622), (10, 2.2281), (30, 2.0423), (63, 1.9983), (1000, 1.9623)):
        assert _student(freedom) == pytest.approx(quantile, abs=5e-4)


def test_intervals_need_a_hundred_values():
    assert standard_error(np.arange(99.0)) is None and interval(np.ones(99)).low is None
    error, freedom = standard_error(np.arange(100.0))
    assert freedom == 9 and error == pytest.approx(np.arange(4.5, 100, 10).std(ddof=1) / math.sqrt(10))


def test_a_perplexity_beyond_all_numbers():
    from quantize8.commands.evaluate import _exp

    assert _exp(1e4) == math.inf


def test_smollm2_loses_what_llm_int8_loses(smollm2_int8, smollm2_gguf):
    """Values measured without this code: perplexity 22.113, and KL 0.0140 of bitsandbytes on these tokens."""
    found = quantize8.evaluate(str(smollm2_int8), reference=str(smollm2_gguf), tokens=2048, layers=True)
    agreement = found.agreement
    assert (found.tokens, found.scored, found.context) == (2048, 2046, 1024) and TEXT.is_file()
    assert agreement.perplexity.value == pytest.approx(22.113, abs=0.01)
    assert found.perplexity.value == pytest.approx(22.6, abs=0.15)
    assert agreement.kl.mean == pytest.approx(0.014, abs=0.001) and 0.92 < agreement.top1 < 0.95
    # the 20th largest of the tokens: 0.079 to 0.095 by the last bits of float sums
    assert agreement.kl.p99 == pytest.approx(0.085, abs=0.015)
    assert agreement.ratio.low > 1 and agreement.ratio.high < 1.05
    assert len(agreement.layers) == 30 and all(0.01 < value < 0.1 for value in agreement.layers.values())
