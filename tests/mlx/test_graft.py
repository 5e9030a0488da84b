"""Streams grafted onto plain models: the prefixes are the model's own past, all streams alike."""

import json
import shutil

from parscale_mlx import Model, load, load_model
from parscale_mlx.convert import convert
from parscale_mlx.graft import cut_pieces, default_text, graft, grafted_config, make_prefixes

import mlx.core as mx
import pytest
from helpers.golden_cases import GOLDEN, difference
from parscale_core.checkpoint.config import ModelConfig
from tokenizers import Tokenizer, models, pre_tokenizers

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
LONGROPE = {
    "rope_type": "longrope",
    "original_max_position_embeddings": 64,
    "short_factor": [1.0] * 8,
    "long_factor": [1.0, 1.1, 1.3, 1.7, 2.0, 3.0, 4.0, 5.0],
}
LINEAR = {"rope_type": "linear", "factor": 3.0}
NEWER = [
    {"model_type": "qwen3", "head_dim": 32, "attention_bias": True},
    {"model_type": "mistral", "sliding_window": None},
    {"model_type": "smollm3", "no_rope_layers": [1, 0]},
    {"model_type": "granite", "embedding_multiplier": 3.0, "attention_multiplier": 0.3,
     "residual_multiplier": 0.5, "logits_scaling": 2.0},
]  # fmt: skip


def plain_config(model_type="llama", rope_scaling=None) -> dict:
    return {
        "model_type": model_type,
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "intermediate_size": 96,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 320,
        "max_position_embeddings": 512,
        "rope_scaling": rope_scaling,
    }


def plain_model(config: dict) -> Model:
    mx.random.seed(7)
    model = Model(ModelConfig.from_dict(config))
    # Large enough that attention tells one past from another.
    model.update({"model": {"embed_tokens": {"weight": mx.random.normal((320, 64))}}})
    for layer in model.layers:
        for name in ("q_proj", "k_proj"):
            layer.self_attn[name].weight = mx.random.normal(layer.self_attn[name].weight.shape) / 4
    return model


@pytest.mark.parametrize("scaling", [None, LINEAR, LLAMA3, YARN, LONGROPE], ids=str)
@pytest.mark.parametrize("model_type", ["qwen2", "llama"])
def test_streams_of_one_text_are_the_model_after_that_text(model_type, scaling):
    check_streams_of_one_text(plain_config(model_type, scaling))


@pytest.mark.parametrize("fields", NEWER, ids=lambda fields: fields["model_type"])
def test_streams_of_one_text_in_other_families(fields):
    check_streams_of_one_text(plain_config() | fields)


def check_streams_of_one_text(config):
    model = plain_model(config)
    past, rest = mx.random.randint(0, 320, (1, 24)), mx.random.randint(0, 320, (2, 40))
    whole = mx.concatenate([mx.repeat(past, 2, axis=0), rest], axis=1)
    expected, unaware = model(whole)[:, 24:], model(rest)
    mx.eval(expected, unaware)

    prefixes = make_prefixes(model, mx.repeat(past, 2, axis=0))
    graft(model, grafted_config(config, streams=2, prefix_length=24), prefixes)

    scale = mx.abs(expected).max().item()
    assert difference(model(rest), expected) < 1e-4 * scale
    assert difference(model(rest, cache=model.make_cache()), expected) < 1e-4 * scale
    assert difference(unaware, expected) > 0.01 * scale


def test_each_stream_has_its_own_past_and_the_same_weight():
    config = plain_config()
    model = plain_model(config)
    pieces, rest = mx.random.randint(0, 320, (3, 8)), mx.random.randint(0, 320, (1, 6))
    alone = []
    for piece in pieces:
        h = model.model(mx.concatenate([piece[None], rest], axis=1))
        alone.append(h[0, 0, 8:])
    mx.eval(alone)
    graft(model, grafted_config(config, streams=3, prefix_length=8), make_prefixes(model, pieces))
    assert model.model_type == "llama_parscale"
    hidden = model.model(rest)[0]
    for stream, expected in zip(hidden, alone, strict=True):
        assert difference(stream, expected) < 1e-4
    assert difference(model.aggregation_weights(rest), mx.full((1, 6, 3), 1 / 3)) < 1e-6


def test_the_aggregator_can_learn():
    config = plain_config()
    model = plain_model(config)
    pieces = mx.random.randint(0, 320, (2, 8))
    graft(model, grafted_config(config, streams=2, prefix_length=8), make_prefixes(model, pieces))
    import mlx.nn as nn

    ids = mx.random.randint(0, 320, (1, 12))
    loss = nn.value_and_grad(
        model, lambda m: nn.losses.cross_entropy(m(ids[:, :-1]), ids[:, 1:]).mean()
    )
    _, gradients = loss(model)
    assert mx.abs(gradients["model"]["aggregator"]["fc2"]["weight"]).max().item() > 0
    assert mx.abs(gradients["model"]["layers"][0]["self_attn"]["prefix_k"]).max().item() > 0


@pytest.fixture
def plain_folder(tmp_path):
    """Golden case p1, a plain Qwen2 model, with a tokenizer of single characters."""
    folder = shutil.copytree(GOLDEN / "p1", tmp_path / "plain")
    vocabulary = {"<unk>": 0, **{c: n for n, c in enumerate(map(chr, range(32, 127)), 3)}}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"})
    )
    return folder


def test_convert_grafts(plain_folder, tmp_path):
    result = convert(plain_folder, tmp_path / "out", streams=4, prefix_length=12)
    assert (result.streams, result.prefix_length) == (4, 12)
    # The weights are random: any text is as unlikely as another.
    assert result.perplexity == pytest.approx(result.base_perplexity, rel=0.1)
    model, config = load_model(tmp_path / "out")
    assert config["model_type"] == "qwen2_parscale"
    assert (config["parscale_n"], config["parscale_n_tokens"]) == (4, 12)
    weights = model.aggregation_weights(mx.array([[5, 6, 7]]))
    assert difference(weights, mx.full((1, 3, 4), 0.25)) < 1e-6
    planned = convert(plain_folder, tmp_path / "dry", streams=4, prefix_length=12, dry_run=True)
    assert (planned.parameters, planned.bytes) == (result.parameters, result.bytes)
    again, _ = load(tmp_path / "out")
    prefix = again.layers[0].self_attn.prefix_k
    assert prefix.shape == (4, 2, 12, 16)
    assert difference(prefix[0], prefix[1]) > 0.01


def test_text_of_ones_own(plain_folder, tmp_path):
    text = "Streams differ by what they have read. " * 20
    result = convert(plain_folder, tmp_path / "out", streams=2, prefix_length=8, text=text)
    assert result.streams == 2
    with pytest.raises(ValueError, match=r"the text has 38 tokens; 2 prefixes of 8"):
        convert(plain_folder, tmp_path / "o", streams=2, prefix_length=8, text=text[:38])


def test_what_cannot_be_grafted(plain_folder, tmp_path):
    with pytest.raises(ValueError, match="the model already has 4 streams"):
        convert(GOLDEN / "p4", tmp_path / "out", streams=2)
    with pytest.raises(ValueError, match="65 streams: not a number from 1 to 64"):
        convert(plain_folder, tmp_path / "out", streams=65)
    for file in plain_folder.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(FileNotFoundError, match="no tokenizer"):
        convert(plain_folder, tmp_path / "out", streams=2)
    assert [p.name for p in tmp_path.iterdir()] == ["plain"]


@pytest.mark.slow
def test_a_real_model_stays_what_it_was(tmp_path):
    from parscale_core.checkpoint.packaged import smollm2_folder

    folder = smollm2_folder()
    result = convert(folder, tmp_path / "out", streams=4)
    assert 5 < result.base_perplexity < 15
    assert result.perplexity == pytest.approx(result.base_perplexity, rel=0.03)
    model, tokenizer = load(tmp_path / "out")
    ids = mx.array([tokenizer.encode("The capital of France is")])
    assert difference(model.aggregation_weights(ids), mx.full((1, 5, 4), 0.25)) < 1e-6
    assert tokenizer.decode(model(ids)[0, -1].argmax().item()) == " Paris"
    pieces = cut_pieces(tokenizer, default_text(), streams=4, prefix_length=48)
    assert pieces.prefixes.shape == (4, 48)
    assert len(set(map(tuple, pieces.prefixes.tolist()))) == 4
