"""What each rank reads of a model's files, and that it is the same model for all that."""

import json
import shutil
import sys
from pathlib import Path

import parscale_mlx
from parscale_mlx.adapter import save_adapter, take_streams
from parscale_mlx.convert import convert

import mlx.core as mx
import pytest
from helpers import rank_jobs
from helpers.rank_processes import run_ranks
from helpers.tiny_models import write_tokenizer
from mlx.utils import tree_flatten, tree_map
from parscale_core.checkpoint.adapter import fingerprint
from parscale_core.checkpoint.config import ModelConfig
from parscale_core.checkpoint.weight_files import read_header
from parscale_core.convert_settings import Quantization

CONFIG = {
    "model_type": "qwen2",
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "intermediate_size": 4096,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 320,
    "parscale_n": 4,
    "parscale_n_tokens": 2048,
}
ROWS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
PREFIXES = ("prefix_k", "prefix_v")
SLACK = 900_000  # bytes of headers, tokenizer, configuration, and the samples that ranks compare


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A model in bfloat16, most of whose bytes are prefixes, and gates of its layers."""
    folder = tmp_path_factory.mktemp("models") / "p4"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    write_tokenizer(folder)
    mx.random.seed(1)
    model = parscale_mlx.Model(ModelConfig.from_dict(CONFIG))
    parameters = tree_map(
        lambda a: (mx.random.normal(a.shape) * 0.1).astype(mx.bfloat16), model.parameters()
    )
    mx.save_safetensors(str(folder / "model.safetensors"), dict(tree_flatten(parameters)))
    return folder


@pytest.fixture(scope="module")
def backbone(folder, tmp_path_factory) -> Path:
    """The same, its streams in an adapter beside it."""
    backbone = shutil.copytree(folder, tmp_path_factory.mktemp("models") / "backbone")
    (backbone / "config.json").write_text(json.dumps(CONFIG | {"parscale_n": 1}))
    weights = mx.load(str(folder / "model.safetensors"))
    plain = {k: v for k, v in weights.items() if "prefix" not in k and "aggregat" not in k}
    mx.save_safetensors(str(backbone / "model.safetensors"), plain)
    model, _ = parscale_mlx.load_model(folder, dtype=mx.bfloat16)
    streams = take_streams(model, backbone="b", backbone_sha256=fingerprint(backbone))
    save_adapter(backbone / "adapters" / "p4", streams)
    return backbone


def tokens_of_one_process(folder) -> list[int]:
    model, _ = parscale_mlx.load_model(folder)
    return mx.argmax(model(mx.array([[5, 17, 42, 9, 3, 64]]))[0], axis=-1).tolist()


def size(file: Path, parts: tuple[str, ...]) -> int:
    """Bytes of the tensors with one of these parts in their names."""
    entries = read_header(file).items()
    return sum(entry.size for name, entry in entries if any(part in name for part in parts))


def check_ranks(outcomes, expected: float, tokens: list[int]):
    for outcome in outcomes:
        assert outcome.exit_code == 0, outcome.err
        read, found = outcome.result
        assert found == tokens
        if sys.platform == "linux":
            assert expected <= read < expected + SLACK


@pytest.mark.parametrize(("count", "mode", "parts", "kept"), [
    (2, "streams", PREFIXES, 1 / 2),
    (2, "tensor", ROWS, 1 / 2),
    (4, "streams", PREFIXES, 1 / 4),
    (4, "2x2", (*PREFIXES, *ROWS), 1 / 2),
])  # fmt: skip
def test_each_rank_reads_its_share(folder, count, mode, parts, kept):
    file = folder / "model.safetensors"
    shared = size(file, parts)
    assert shared * (1 - kept) > 2 * SLACK
    outcomes = run_ranks(count, rank_jobs.load_and_count, folder, None, mode)
    expected = size(file, ("",)) - shared * (1 - kept)
    check_ranks(outcomes, expected, tokens_of_one_process(folder))


def test_of_an_adapter_too(folder, backbone):
    adapter = backbone / "adapters" / "p4"
    file = adapter / "adapters.safetensors"
    whole = size(backbone / "model.safetensors", ("",)) + size(file, ("",))
    outcomes = run_ranks(2, rank_jobs.load_and_count, backbone, adapter, "streams")
    check_ranks(outcomes, whole - size(file, PREFIXES) / 2, tokens_of_one_process(folder))


@pytest.mark.parametrize("dequantize", [False, True])
def test_of_quantised_weights_too(folder, tmp_path, dequantize):
    packed = tmp_path / "packed"
    convert(folder, packed, quantization=Quantization())
    file = packed / "model.safetensors"
    shared = 0 if dequantize else size(file, ROWS)
    outcomes = run_ranks(2, rank_jobs.load_and_count, packed, None, "tensor", dequantize)
    check_ranks(outcomes, size(file, ("",)) - shared / 2, tokens_of_one_process(packed))
