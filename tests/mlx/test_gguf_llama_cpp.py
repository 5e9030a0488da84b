"""GGUF files as llama.cpp reads them: logits, ends of text, tokens."""

from parscale_mlx import load_model
from parscale_mlx.convert import convert

import mlx.core as mx
import numpy as np
import pytest
from helpers.gguf_files import random_weights, write_gguf
from parscale_core.checkpoint.gguf.reader import open_gguf, read_config
from test_gguf import byte_tokenizer
from transformers import AutoTokenizer

pytest.importorskip("xllamacpp", reason="needs llama.cpp (pip install xllamacpp)")
from helpers.llama_cpp import LlamaCpp, words

YARN = {"type": "yarn", "factor": 4.0, "original_context_length": 64}


def scaling(**values):
    """For a GGUF writer, keys below ``llama.rope.scaling``."""

    def add(writer):
        for name, value in values.items():
            kinds = {str: writer.add_string, int: writer.add_uint32, float: writer.add_float32}
            kinds[type(value)](f"llama.rope.scaling.{name}", value)

    return add


@pytest.mark.parametrize(
    "metadata",
    [
        [],
        [scaling(type="none", factor=4.0)],
        [scaling(type="linear", factor=4.0)],
        [scaling(factor=4.0)],
        [lambda writer: writer.add_float32("llama.rope.scale_linear", 4.0)],
        [scaling(**YARN)],
        [scaling(**YARN, attn_factor=0.8)],
        [scaling(type="yarn", factor=4.0)],
        [scaling(type="yarn", attn_factor=0.7)],
        [lambda writer: writer.add_rope_freq_base(5e5)],
    ],
    ids=["plain", "none", "linear", "no type", "old name", "yarn", "yarn magnitude",
         "yarn without length", "magnitude alone", "base"],
)  # fmt: skip
def test_logits(tmp_path, metadata):
    check_logits(write_gguf(tmp_path / "m.gguf", *random_weights(), metadata=[words, *metadata]))


@pytest.mark.parametrize("architecture", ["qwen2", "qwen3"])
def test_logits_of_other_families(tmp_path, architecture):
    weights, sizes = random_weights(biases=architecture == "qwen2")
    random, norms = np.random.default_rng(1), []
    if architecture == "qwen3":
        names = [f"blk.{n}.attn_{part}_norm.weight" for n in (0, 1) for part in "qk"]
        norms = [(name, random.normal(1, 0.3, 16).astype(np.float32)) for name in names]
    kind = {"architecture": architecture, "metadata": [words], "extra": norms}
    check_logits(write_gguf(tmp_path / "m.gguf", weights, sizes, **kind))


def test_logits_of_layers_without_rotary_embedding(tmp_path):
    weights, sizes = random_weights(layers=5)
    kind = {"architecture": "smollm3", "metadata": [words]}
    check_logits(write_gguf(tmp_path / "m.gguf", weights, sizes, **kind))


@pytest.mark.parametrize(
    "multipliers",
    [
        {"logit_scale": 4.0},
        {"logit_scale": 2.0, "residual_scale": 0.4, "embedding_scale": 3.0, "attention.scale": 0.1},
        {"logit_scale": 1.5, "residual_scale": 0.0, "embedding_scale": 0.0, "attention.scale": 0.0},
    ],
    ids=["one", "all", "none"],
)
def test_logits_of_granite(tmp_path, multipliers):
    def add(writer):
        for name, value in multipliers.items():
            writer.add_float32(f"granite.{name}", value)

    kind = {"architecture": "granite", "metadata": [words, add]}
    check_logits(write_gguf(tmp_path / "m.gguf", *random_weights(), **kind))


def check_logits(file):
    """Ours after 100 tokens are llama.cpp's."""
    folder = file.with_suffix("")
    convert(file, folder)
    model, _ = load_model(folder)
    ids = [(7 * n * n + 3 * n + 5) % 317 + 3 for n in range(100)]
    logits = np.array(model(mx.array([ids]))[0, -1], np.float64)
    ours = logits - np.logaddexp.reduce(logits)
    # llama.cpp keeps its cache in float16.
    assert np.abs(ours - LlamaCpp(file).logprobs(ids, 320)).max() < 0.03


def test_qwen3_with_heads_wider_than_the_hidden_size(tmp_path):
    def head_size(writer):
        writer.add_key_length(32)
        writer.add_value_length(32)

    weights = random_weights(qk_norm=True, head_dim=32)
    file = write_gguf(
        tmp_path / "m.gguf", *weights, architecture="qwen3", metadata=[words, head_size]
    )
    convert(file, tmp_path / "out")
    model, config = load_model(tmp_path / "out")
    assert (config["model_type"], model.args.head_dim) == ("qwen3", 32)
    ids = [(7 * n * n + 3 * n + 5) % 317 + 3 for n in range(60)]
    logits = np.array(model(mx.array([ids]))[0, -1], np.float64)
    ours = logits - np.logaddexp.reduce(logits)
    assert np.abs(ours - LlamaCpp(file).logprobs(ids, 320)).max() < 0.03


def test_ends_of_text(tmp_path):
    names = [
        "<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "<|end_of_text|>",
        "<|eom_id|>", "<EOT>", "_<EOT>", "<|im_start|>", "<|start_header_id|>", "<unused>",
        "<end_of_utterance>", "<|return|>", "[EOT]",
    ]  # fmt: skip
    tokens = ["<unk>", "<s>", "</s>", *names, *(f"▁w{n}" for n in range(320 - 3 - len(names)))]

    def vocabulary(writer):
        writer.add_tokenizer_model("llama")
        writer.add_token_list(tokens)
        writer.add_token_scores([0.0] * 320)
        writer.add_token_types([2, 3, 3] + [3] * len(names) + [1] * (317 - len(names)))
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)

    file = write_gguf(tmp_path / "m.gguf", *random_weights(), metadata=[vocabulary])
    ours, theirs = set(read_config(open_gguf(file))["eos_token_id"]), LlamaCpp(file)
    for number in range(2, 3 + len(names)):
        body = {"prompt": [50, 60], "n_predict": 2, "logit_bias": [[number, 1000]]}
        stops = theirs.post("/completion", body)["stop_type"] == "eos"
        assert (number in ours) == stops, tokens[number]


@pytest.mark.parametrize("pre", ["smollm", "gpt-2", "qwen2", "llama-bpe"])
@pytest.mark.parametrize("ends", [False, True])
def test_tokens_of_a_byte_level_vocabulary(tmp_path, pre, ends):
    flags = {"add_add_eos_token": True, "add_add_bos_token": True} if ends else {}
    file = write_gguf(
        tmp_path / "m.gguf", *random_weights(), metadata=[byte_tokenizer(pre, size=320, **flags)]
    )
    convert(file, tmp_path / "out")
    ours, theirs = AutoTokenizer.from_pretrained(tmp_path / "out"), LlamaCpp(file)
    for text in ("  12345 a bc\n\n\tx", "I'm 1234567, DON'T", "<think>a<|end|>", "é 数字", " "):
        assert ours.encode(text) == theirs.tokenize(text), text
