"""What commands do with the newer families, on models that transformers made."""

import json
import math

import numpy as np
import pytest
from helpers.made_folders import add_streams, make
from helpers.tiny_models import error_line, write_tokenizer
from safetensors.numpy import load_file

FAMILIES = {
    "qwen3": {"head_dim": 32, "attention_bias": True},
    "mistral": {"sliding_window": None, "head_dim": 32},
    "smollm3": {"num_hidden_layers": 3, "no_rope_layers": [1, 0, 1]},
    "granite": {
        "embedding_multiplier": 3.0, "attention_multiplier": 0.2, "residual_multiplier": 0.4,
        "logits_scaling": 2.5,
    },
}  # fmt: skip
SIZES = {"vocab_size": 320, "max_position_embeddings": 512}
TRAIN = (
    *("train", "--stage", "streams", "--streams", 2, "--prefix-length", 6, "--seq-length", 32),
    *("--batch-size", 2, "--steps", 4, "--lr", 0.01, "--quiet", "--json"),
)


@pytest.fixture(scope="module", params=FAMILIES)
def plain(request, tmp_path_factory):
    root = tmp_path_factory.mktemp("families")
    folder = make(root / request.param, request.param, **SIZES, **FAMILIES[request.param])
    write_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text("".join(f"line {n} of a text to learn from\n" for n in range(60)))
    return file


def test_streams_are_trained_fused_taken_out_and_exported(parscale, plain, text, tmp_path):
    def run(*arguments):
        result = parscale(*arguments)
        assert result.exit_code == 0, result.output
        return result.stdout

    trained = json.loads(run(*TRAIN, "--model", plain, "--data", text, "-o", tmp_path / "run"))
    assert math.isfinite(trained["valid_loss"])
    assert trained["valid_loss"] < trained["valid_loss_before"]
    adapter, whole = tmp_path / "run" / "adapter", tmp_path / "whole"
    run("fuse", "--model", plain, "--adapter", adapter, "--to", "hf", "-o", whole)
    run("adapter", "extract", whole, "--backbone", plain, "-o", tmp_path / "out")
    one, two = (load_file(f / "adapters.safetensors") for f in (adapter, tmp_path / "out"))
    assert one.keys() == two.keys() and all(np.array_equal(one[k], two[k]) for k in one)
    run("export-onnx", "--model", whole, "-o", tmp_path / "onnx")
    said = ("--prompt", "Hi", "-n", 9, "--quiet")
    texts = {
        run("generate", "--model", plain, "--adapter", tmp_path / "out", *said),
        run("generate", "--model", whole, *said),
        run("generate", "--model", tmp_path / "onnx", *said),
    }
    assert len(texts) == 1
    drop_in = parscale("convert", whole, "--mlx-lm", "-o", tmp_path / "drop-in")
    if "qwen3" in plain.name or "mistral" in plain.name:
        assert drop_in.exit_code == 0, drop_in.output
    else:
        assert "a model file is written for qwen2, qwen3" in error_line(drop_in)


def test_what_is_counted_and_measured(parscale, plain):
    folder = add_streams(plain, 3, 5)
    tensors = load_file(folder / "model.safetensors")
    counted = json.loads(parscale("cost", folder, "--streams", 3, "--json").stdout)
    sizes = {name: value.size for name, value in tensors.items()}
    ends = [n for name, n in sizes.items() if "embed_tokens" in name or "lm_head" in name]
    assert counted["parameters"] == sum(sizes.values())
    assert counted["parameters_outside_embedding"] == sum(sizes.values()) - sum(ends)
    bench = (
        "bench",
        "--streams",
        2,
        "--prompt",
        4,
        "--tokens",
        2,
        "--repeats",
        1,
        "--model",
        plain,
    )
    measured = parscale(*bench)
    if "qwen3" in plain.name:
        assert "mlx-lm's own class of qwen3 has other tensors" in error_line(measured)
    else:
        assert measured.exit_code == 0, measured.output
