"""The model against mlx-lm's own classes, the published formula, and configurations it refuses."""

import json

from parscale_mlx import Model
from parscale_mlx.model import Attention

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from helpers.golden_cases import TOLERANCE, difference, load_golden
from mlx.utils import tree_map
from mlx_lm.models import llama, qwen2
from parscale_core.checkpoint.config import ModelConfig

FIELDS = dict(
    hidden_size=64,
    num_hidden_layers=2,
    intermediate_size=96,
    num_attention_heads=4,
    num_key_value_heads=2,
    rms_norm_eps=1e-5,
    vocab_size=50,
)
ROPE_SCALINGS = {
    "none": None,
    "linear": {"type": "linear", "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    "longrope": {
        "rope_type": "longrope",
        "original_max_position_embeddings": 64,
        "short_factor": [1.0] * 8,
        "long_factor": [1.0 + 0.5 * i for i in range(8)],
    },
}


def randomised(model):
    mx.random.seed(3)
    model.update(tree_map(lambda a: mx.random.normal(a.shape) * 0.1, model.parameters()))
    return model


@pytest.mark.parametrize(
    ("theirs", "changes"),
    [
        (qwen2, dict(model_type="qwen2", tie_word_embeddings=False)),
        (qwen2, dict(model_type="qwen2", tie_word_embeddings=True, rope_theta=1e6)),
        (llama, dict(model_type="llama", tie_word_embeddings=False, head_dim=24)),
        (
            llama,
            dict(model_type="llama", tie_word_embeddings=True, attention_bias=True, mlp_bias=True),
        ),
        (
            llama,
            dict(
                model_type="llama", tie_word_embeddings=True, rope_scaling=ROPE_SCALINGS["llama3"]
            ),
        ),
    ],
)
def test_one_stream_is_the_plain_decoder(theirs, changes):
    fields = FIELDS | dict(rope_theta=10000.0, max_position_embeddings=512) | changes
    reference = randomised(theirs.Model(theirs.ModelArgs.from_dict(fields)))
    model = Model(ModelConfig.from_dict(fields))
    model.load_weights(list(nn.utils.tree_flatten(reference.parameters())), strict=True)
    ids = mx.array([[3, 1, 4, 1, 5, 9, 2, 6], [2, 7, 1, 8, 2, 8, 1, 8]])
    assert difference(model(ids), reference(ids)) < 1e-6
    cache = model.make_cache()
    model(ids[:, :5], cache=cache)
    assert difference(model(ids[:, 5:], cache=cache), reference(ids)[:, 5:]) < 1e-5


def published_attention(attention: Attention, x: mx.array) -> mx.array:
    """Attention of one stream each as the paper has it: tokens from 0, prefix unrotated."""
    streams = []
    for p in range(x.shape[1]):
        B, L, _ = x[:, p].shape
        q, k, v = (
            proj(x[:, p]).reshape(B, L, n, -1).swapaxes(1, 2)
            for proj, n in (
                (attention.q_proj, attention.n_heads),
                (attention.k_proj, attention.n_kv_heads),
                (attention.v_proj, attention.n_kv_heads),
            )
        )
        group = attention.n_heads // attention.n_kv_heads
        prefix_k, prefix_v = (
            mx.stack([attention.prefix_k[p]] * B),
            mx.stack([attention.prefix_v[p]] * B),
        )
        k = mx.repeat(mx.concatenate([prefix_k, attention.rope(k)], axis=2), group, axis=1)
        v = mx.repeat(mx.concatenate([prefix_v, v], axis=2), group, axis=1)
        scores = attention.rope(q) @ k.swapaxes(2, 3) * attention.scale
        hidden = mx.arange(k.shape[2])[None] > mx.arange(L)[:, None] + attention.prefix_k.shape[2]
        scores = mx.softmax(mx.where(hidden, -mx.inf, scores), axis=-1)
        streams.append(attention.o_proj((scores @ v).swapaxes(1, 2).reshape(B, L, -1)))
    return mx.stack(streams, axis=1)


@pytest.mark.parametrize("scaling", ROPE_SCALINGS)
@pytest.mark.parametrize("family", ["qwen2_parscale", "llama_parscale"])
def test_the_prefix_is_a_past_for_every_rope_scaling(scaling, family):
    args = ModelConfig.from_dict(
        FIELDS
        | dict(
            model_type=family,
            parscale_n=3,
            parscale_n_tokens=10,
            max_position_embeddings=256,
            rope_scaling=ROPE_SCALINGS[scaling],
        )
    )
    model = randomised(Model(args))
    attention = model.layers[0].self_attn
    x = mx.random.normal((2, 3, 6, 64))
    expected = published_attention(attention, x)
    assert difference(attention(x, mask="causal"), expected) < 1e-4
    cache = model.make_cache()[0]
    first = attention(x[:, :, :4], mask="causal", cache=cache)
    rest = [attention(x[:, :, i : i + 1], cache=cache) for i in range(4, 6)]
    assert difference(mx.concatenate([first, *rest], axis=2), expected) < 1e-4


def test_sixty_four_streams():
    args = ModelConfig.from_dict(FIELDS | dict(model_type="llama_parscale", parscale_n=64))
    model = randomised(Model(args))
    ids = mx.array([[3, 1, 4, 1, 5]])
    assert difference(model(ids, cache=model.make_cache()), model(ids)) < 1e-4


def test_aggregation_weights_follow_the_published_formula():
    golden = load_golden("p8-short-prefix")
    raw = mx.load(str(golden.folder / "model.safetensors"))
    ids = mx.array([golden.rows[0].ids])
    hidden = np.array(golden.model.model(ids))  # [B, P, L, d]
    # (hidden, stream) columns, the stream fastest: d outside, P inside.
    x = hidden.transpose(0, 2, 3, 1).reshape(1, ids.shape[1], -1)
    layer = {name: np.array(raw[f"model.aggregate_layer.{name}"]) for name in
             ("0.weight", "0.bias", "2.weight", "2.bias")}  # fmt: skip
    h = x @ layer["0.weight"].T + layer["0.bias"]
    logits = (h / (1 + np.exp(-h))) @ layer["2.weight"].T + layer["2.bias"]
    softmax = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    weights = np.array(golden.model.aggregation_weights(ids))
    np.testing.assert_allclose(weights, softmax * 0.9 + 0.1 / 8, atol=1e-5)
    np.testing.assert_allclose(weights.sum(-1), 1, atol=1e-6)


def test_one_stream_has_the_whole_weight():
    golden = load_golden("p1")
    assert golden.model.aggregation_weights(mx.array([[1, 2, 3]])).tolist() == [[[1.0]] * 3]


def test_input_embeddings_stand_in_for_tokens(p4):
    ids = mx.array([p4.rows[0].ids])
    embeddings = p4.model.model.embed_tokens(ids)
    logits = p4.model(ids, input_embeddings=embeddings)
    assert difference(logits[0], p4.rows[0].logits) < TOLERANCE


def test_gradients_reach_the_prefixes(p4):
    def loss(model):
        return model(mx.array([p4.rows[0].ids])).square().mean()

    _, gradient = nn.value_and_grad(p4.model, loss)(p4.model)
    for name in ("prefix_k", "prefix_v"):
        assert mx.abs(gradient["model"]["layers"][2]["self_attn"][name]).min().item() > 0


def test_rope_parameters_of_newer_configurations():
    parameters = {"rope_theta": 5e5, **ROPE_SCALINGS["llama3"]}
    new = ModelConfig.from_dict(FIELDS | dict(model_type="llama", rope_parameters=parameters))
    assert (new.rope.theta, new.rope.kind) == (5e5, "llama3")


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        (dict(model_type="mamba"), "model_type 'mamba'"),
        (dict(parscale_n=0), "parscale_n 0"),
        (dict(parscale_n=65), "parscale_n 65"),
        (dict(parscale_n="four"), "parscale_n 'four'"),
        (dict(parscale_n=4, parscale_n_tokens=0), "parscale_n_tokens 0"),
        (dict(parscale_attn_smooth=2.0), "parscale_attn_smooth 2.0"),
        (dict(num_key_value_heads=3), "num_key_value_heads 3"),
        (dict(hidden_act="gelu"), "hidden_act 'gelu'"),
        (dict(use_sliding_window=True), "use_sliding_window"),
    ],
)
def test_a_configuration_it_cannot_run_is_named(changes, named):
    with pytest.raises(ValueError, match=named):
        ModelConfig.from_dict(FIELDS | dict(model_type="qwen2_parscale") | changes)


def test_golden_configurations_are_what_the_cases_say():
    for name, streams in (("p4", 4), ("p2-tied-sharded", 2), ("p8-short-prefix", 8), ("p1", 1)):
        golden = load_golden(name)
        config = json.loads((golden.folder / "config.json").read_text())
        assert golden.model.args.streams == config["parscale_n"] == streams
