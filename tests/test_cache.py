"""The preallocated cache: the same keys, values and tokens as transformers' own cache after any operation."""

import pytest
import torch
from helpers.making import llama, word_tokenizer
from transformers import (
    DynamicCache,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    MambaConfig,
    MambaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from quantize8 import load, run
from quantize8.runtime.cache import PreallocatedLayer, preallocated_cache


def states(tokens: int, seed: int, batch: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of different sizes, as in multi-head latent attention; not contiguous, as models give them."""
    generator = torch.Generator().manual_seed(seed)
    keys, values = (torch.randn(batch, tokens, 3, size, generator=generator).transpose(1, 2) for size in (8, 5))
    return keys, values


def assert_same(layer: PreallocatedLayer, reference: DynamicLayer) -> None:
    assert layer.get_seq_length() == reference.get_seq_length()
    assert layer.get_mask_sizes(1) == reference.get_mask_sizes(1)
    assert layer.keys.equal(reference.keys) and layer.values.equal(reference.values)


@pytest.mark.parametrize("length", [0, 1, 9, 10, 100])
def test_what_is_appended_comes_back(length):
    layer, reference = PreallocatedLayer(length), DynamicLayer()
    assert layer.get_seq_length() == 0
    for step, tokens in enumerate([7, 1, 1, 1, 5, 1]):
        keys, values = layer.update(*states(tokens, step))
        expected = reference.update(*states(tokens, step))
        assert keys.equal(expected[0]) and values.equal(expected[1])
        assert_same(layer, reference)


def test_no_step_copies_what_is_there():
    layer = PreallocatedLayer(12)
    places = {layer.update(*states(1, step))[0].data_ptr() for step in range(12)}
    assert len(places) == 1
    assert layer.update(*states(1, 12))[0].data_ptr() not in places  # the 13th token of 12
    places = {layer.update(*states(1, step))[0].data_ptr() for step in range(13, 26)}
    assert len(places) == 1


@pytest.mark.parametrize(
    "change",
    [
        lambda layer: layer.crop(-3),
        lambda layer: layer.reorder_cache(torch.tensor([1, 0])),
        lambda layer: layer.batch_repeat_interleave(2),
        lambda layer: layer.batch_select_indices(torch.tensor([1])),
        lambda layer: layer.batch_select_indices(slice(0, 1)),
    ],
    ids=["crop", "reorder", "repeat", "select", "slice"],
)
def test_a_changed_cache_goes_on_from_what_it_was_changed_to(change):
    layer, reference = PreallocatedLayer(20), DynamicLayer()
    for each in (layer, reference):
        each.update(*states(7, 0))
    before = layer.keys.clone(), layer.keys
    for each in (layer, reference):
        change(each)
    assert_same(layer, reference)
    for step in (1, 2):
        batch = len(reference.keys)
        for each in (layer, reference):
            each.update(*states(1, step, batch))
        assert_same(layer, reference)
    assert before[0].equal(before[1])  # who holds what an earlier step returned still has it


def test_reset_leaves_nothing():
    layer = PreallocatedLayer(4)
    layer.update(*states(3, 0))
    layer.reset()
    layer.update(*states(2, 1, 1))
    reference = DynamicLayer()
    reference.update(*states(2, 1, 1))
    assert_same(layer, reference)


def test_logits_are_those_of_the_dynamic_cache_in_every_bit(tmp_path):
    model, _ = load(llama(tmp_path / "llama"), "cpu")
    prompt, rest = torch.arange(11)[None], torch.tensor([5, 60, 0, 33])
    logits = []
    with torch.inference_mode():
        for cache in (DynamicCache(config=model.config), preallocated_cache(model, 13)):
            outputs = [model(prompt, past_key_values=cache).logits]
            outputs += [model(token.view(1, 1), past_key_values=cache).logits for token in rest]
            logits.append(torch.cat(outputs, 1))
    assert logits[0].equal(logits[1])


def test_beam_search_finds_the_same(tmp_path):
    model, _ = load(llama(tmp_path / "llama"), "cpu")
    ids = torch.arange(6)[None]
    options = {"max_new_tokens": 9, "num_beams": 3, "do_sample": False, "pad_token_id": 0}
    found = model.generate(ids, past_key_values=preallocated_cache(model, 8), **options)
    assert found.equal(model.generate(ids, **options))


def test_sliding_windows_keep_their_layers():
    config = Gemma3TextConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, head_dim=8,
        num_key_value_heads=2, sliding_window=4, layer_types=["sliding_attention", "full_attention"],
    )  # fmt: skip
    torch.manual_seed(0)
    model = Gemma3ForCausalLM(config).eval()
    cache = preallocated_cache(model, 20)
    assert [type(layer) for layer in cache.layers] == [DynamicSlidingWindowLayer, PreallocatedLayer]
    ids = torch.arange(9)[None]
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    assert model.generate(ids, past_key_values=cache, **options).equal(model.generate(ids, **options))


def test_a_model_with_another_cache_keeps_it():
    encoder_decoder = T5ForConditionalGeneration(T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=1))
    state_space = MambaForCausalLM(MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1))
    for model in (encoder_decoder, state_space):
        assert preallocated_cache(model, 8) is None


def test_a_cache_that_the_model_asks_for_is_kept(tmp_path):
    source = word_tokenizer(llama(tmp_path / "llama"))
    expected = run(str(source), "w1 w2 w3", max_new_tokens=4, device="cpu").tokens
    (source / "generation_config.json").write_text('{"do_sample": false, "cache_implementation": "static"}')
    model, _ = load(source, "cpu")
    assert preallocated_cache(model, 8) is None
    assert run(str(source), "w1 w2 w3", max_new_tokens=4, device="cpu").tokens == expected
