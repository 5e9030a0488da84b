"""mlx-lm's caches, speculative decoding and quantisation over a model with a prefix."""

from parscale_mlx import Model, batch_generate, stream_generate

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from helpers.golden_cases import TOLERANCE, difference, load_golden
from mlx.utils import tree_flatten
from mlx_lm.generate import generate_step, speculative_generate_step
from mlx_lm.models.cache import (
    BatchKVCache,
    KVCache,
    RotatingKVCache,
    load_prompt_cache,
    make_prompt_cache,
    save_prompt_cache,
    trim_prompt_cache,
)
from mlx_lm.utils import dequantize_model, quantize_model
from parscale_core.checkpoint.config import ModelConfig


def random_model(streams=4, head_dim=64, **changes) -> Model:
    """A model whose heads are wide enough for mlx-lm's quantised KV cache."""
    mx.random.seed(7)
    fields = dict(
        model_type="qwen2_parscale",
        hidden_size=128,
        num_hidden_layers=2,
        intermediate_size=256,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=head_dim,
        vocab_size=100,
        parscale_n=streams,
        parscale_n_tokens=16,
    )
    model = Model(ModelConfig.from_dict(fields | changes))
    model.update(
        nn.utils.tree_map(
            lambda a: mx.random.normal(a.shape) * (0.5 if a.ndim == 4 else 0.08), model.parameters()
        )
    )
    mx.eval(model.parameters())
    return model


def greedy(model, ids, n, cache, **options):
    steps = generate_step(mx.array(ids), model, max_tokens=n, prompt_cache=cache, **options)
    return [token for token, _ in steps]


def test_saved_and_loaded_prompt_cache(golden, tmp_path):
    row = golden.rows[0]
    cache = make_prompt_cache(golden.model)
    golden.model(mx.array([row.ids[:-1]]), cache=cache)
    save_prompt_cache(str(tmp_path / "cache.safetensors"), cache)
    loaded = load_prompt_cache(str(tmp_path / "cache.safetensors"))
    assert greedy(golden.model, row.ids[-1:], 12, loaded) == row.greedy_tokens


def test_trimmed_prompt_cache(golden):
    row = golden.rows[0]
    cache = golden.model.make_cache()
    golden.model(mx.array([row.ids + [9, 8, 7]]), cache=cache)
    assert trim_prompt_cache(cache, 4) == 4
    assert greedy(golden.model, row.ids[-1:], 12, cache) == row.greedy_tokens


def test_trimming_everything_leaves_the_prefix(golden, tmp_path):
    row = golden.rows[0]
    cache = golden.model.make_cache()
    golden.model(mx.array([row.ids]), cache=cache)
    save_prompt_cache(str(tmp_path / "cache.safetensors"), cache)
    for held in (cache, load_prompt_cache(str(tmp_path / "cache.safetensors"))):
        assert trim_prompt_cache(held, 10**6) == len(row.ids)
        assert difference(golden.model(mx.array([row.ids]), cache=held)[0], row.logits) < TOLERANCE


@pytest.mark.parametrize("bits", [8, 4])
def test_quantised_kv_cache(bits):
    model = random_model()
    ids = mx.array([[5, 17, 42, 99, 3, 64, 28]])
    exact = model(ids)[0, -1]
    cache = [c.to_quantized(group_size=64, bits=bits) for c in model.make_cache()]
    for i in range(ids.shape[1]):
        logits = model(ids[:, i : i + 1], cache=cache)[0, -1]
    spread = mx.abs(exact).max().item()
    assert difference(logits, exact) < spread * (0.02 if bits == 8 else 0.2)
    assert trim_prompt_cache(cache, 10**6) == ids.shape[1]
    again = model(ids, cache=cache)[0, -1]
    assert difference(again, logits) < spread * 1e-3


def test_generate_step_quantises_a_prefixed_cache():
    model = random_model()
    ids = [5, 17, 42, 99, 3, 64, 28]
    exact = greedy(model, ids, 8, None)
    assert greedy(model, ids, 8, None, kv_bits=8, quantized_kv_start=0) == exact


def test_rotating_cache_larger_than_the_text_changes_nothing(golden):
    row = golden.rows[0]
    cache = golden.model.make_cache(max_kv_size=len(row.ids) + 20)
    assert greedy(golden.model, row.ids, 12, cache, prefill_step_size=3) == row.greedy_tokens


@pytest.mark.parametrize("chunk", [2, 5, 13, 40])
def test_rotating_cache_keeps_the_prefix_in_every_chunking(p4, chunk):
    ids = [(7 * i + 3) % 320 for i in range(40)]
    one_by_one = p4.model.make_cache(max_kv_size=12)
    expected = mx.concatenate([p4.model(mx.array([[t]]), cache=one_by_one)[0] for t in ids])
    cache = p4.model.make_cache(max_kv_size=12)
    actual = mx.concatenate(
        [p4.model(mx.array([ids[i : i + chunk]]), cache=cache)[0] for i in range(0, 40, chunk)]
    )
    assert difference(actual, expected) < TOLERANCE
    prefix, _ = p4.model.layers[0].self_attn.prefix(mx.float32)
    assert difference(cache[0].keys[:, :, : prefix.shape[2]], prefix) == 0


def test_rotating_cache_sees_its_window(p4):
    # With the prefix, the four first tokens and the last eight: what is in between has no say.
    def last_logits(middle):
        cache = p4.model.make_cache(max_kv_size=12)
        for token in [1, 2, 3, 4, *middle, *range(20, 100)]:
            logits = p4.model(mx.array([[token]]), cache=cache)
        return logits[0, -1]

    # Three layers of a window of eight reach 24 tokens back, far less than the 80 that follow.
    assert difference(last_logits([5, 6, 7]), last_logits([200, 201, 202])) < TOLERANCE


def test_rotating_cache_is_saved_with_its_prefix(p4, tmp_path):
    cache = p4.model.make_cache(max_kv_size=12)
    p4.model(mx.array([list(range(30))]), cache=cache)
    save_prompt_cache(str(tmp_path / "c.safetensors"), cache)
    loaded = load_prompt_cache(str(tmp_path / "c.safetensors"))
    ids = mx.array([[31, 32, 33]])
    assert difference(p4.model(ids, cache=loaded)[0], p4.model(ids, cache=cache)[0]) == 0


def test_rotating_caches_do_not_join_a_batch(p4):
    caches = [p4.model.make_cache(max_kv_size=12)[0] for _ in range(2)]
    with pytest.raises(ValueError, match="rotating KV cache cannot join a batch"):
        caches[0].merge(caches)
    with pytest.raises(ValueError, match="max_kv_size"):
        batch_generate(p4.model, None, [[1, 2]], max_kv_size=12)


@pytest.mark.parametrize(
    "cache", [KVCache, lambda: RotatingKVCache(64, keep=48), lambda: BatchKVCache([0, 1])]
)
def test_an_empty_cache_is_refused(p4, cache):
    with pytest.raises(ValueError, match="holds no prefix"):
        p4.model(mx.array([[1, 2, 3]]), cache=[cache() for _ in p4.model.layers])


def test_max_kv_size_of_the_generator(p4):
    class Tokenizer:
        eos_token_ids = frozenset()

    options = dict(max_kv_size=12, prompt_cache=p4.model.make_cache())
    with pytest.raises(ValueError, match="max_kv_size"):
        list(stream_generate(p4.model, Tokenizer(), [1, 2], **options))
    with pytest.raises(ValueError, match="at least 5"):
        p4.model.make_cache(max_kv_size=3)


@pytest.mark.parametrize("draft", ["p2-tied-sharded", "p1", "p4"])
def test_speculative_decoding(p4, draft):
    draft_model = load_golden(draft).model
    for row in p4.rows:
        steps = speculative_generate_step(
            mx.array(row.ids), p4.model, draft_model, num_draft_tokens=3, max_tokens=12
        )
        assert [token for token, _, _ in steps] == row.greedy_tokens


@pytest.mark.parametrize(
    ("mode", "group", "bits"), [("affine", 32, 4), ("affine", 64, 8), ("mxfp4", 32, 4)]
)
def test_quantised_weights(mode, group, bits):
    model = random_model()
    config = {}
    quantize_model(model, config, group, bits, mode=mode)
    names = dict(tree_flatten(model.parameters()))
    assert "model.layers.0.mlp.up_proj.scales" in names
    assert not any("aggregator" in name and "scales" in name for name in names)
    ids = mx.array([[5, 17, 42, 99, 3]])
    packed = model(ids)
    cached = model(ids, cache=model.make_cache())
    dequantised = dequantize_model(model)(ids)
    assert difference(packed, dequantised) < 1e-3
    assert difference(cached, packed) < 1e-4


def test_nn_quantize_unmodified(p4):
    model = load_golden("p4").model
    nn.quantize(model, group_size=32, bits=8)
    row = p4.rows[0]
    exact, packed = np.array(row.logits), np.array(model(mx.array([row.ids]))[0])
    assert np.abs(exact - packed).max() < 0.1 * np.abs(exact).max()
