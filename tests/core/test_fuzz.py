"""Damaged model folders: loaded or refused in one line, quickly and in little memory."""

import json
import random
import resource
import shutil
import time

import parscale_mlx

import mlx.core as mx
import pytest
from helpers.made_folders import LONGROPE, YARN, make
from parscale_core.checkpoint.tensors import Checkpoint
from parscale_export import export_onnx

COUNT = 300
ODD = (
    None, True, False, 0, -1, 1, 2, 3, 0.5, -0.5, 1e999, float("nan"), 10**9, 10**18, 10**400, "",
    "4", "qwen2", [], [1], {}, {"a": 1}, {"quant_method": "gptq"}, {"bits": 4, "group_size": 64},
    {"bits": 0, "group_size": -1}, {"quant_method": "fp8", "weight_block_size": [0, 0]}, YARN,
    LONGROPE, [[]], "\\ud800", {"rope_type": "yarn", "factor": 0},
)  # fmt: skip
FIELDS = (
    "model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "vocab_size", "rms_norm_eps", "max_position_embeddings",
    "rope_theta", "rope_scaling", "rope_parameters", "tie_word_embeddings", "attention_bias",
    "mlp_bias", "hidden_act", "use_sliding_window", "layer_types", "parscale_n",
    "parscale_n_tokens", "parscale_attn_smooth", "quantization", "quantization_config",
    "partial_rotary_factor", "original_max_position_embeddings", "rope_traditional",
)  # fmt: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return make(tmp_path_factory.mktemp("whole") / "m")


def changed_config(file, choose):
    config = json.loads(file.read_text())
    for _ in range(choose.randint(1, 3)):
        name = choose.choice(FIELDS)
        if choose.random() < 0.15:
            config.pop(name, None)
        else:
            config[name] = choose.choice(ODD)
    file.write_text(json.dumps(config))
    if choose.random() < 0.1:
        file.write_bytes(damaged(file.read_bytes(), choose))


def changed_weights(file, choose):
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    kind = choose.random()
    if kind < 0.4:  # somewhere in the header
        data = data[:8] + damaged(data[8 : 8 + length], choose) + data[8 + length :]
    elif kind < 0.7:  # a field of a tensor in it
        header = json.loads(data[8 : 8 + length])
        entry = header[choose.choice([name for name in header if name != "__metadata__"])]
        field = choose.choice(["dtype", "shape", "data_offsets"])
        odd = {"dtype": ["F64", "I64", "F8_E4M3", "BOOL", "X", None, 3, "F16", "U32", "BF16"],
               "shape": [[], [0], [-1, 4], [10**9, 10**9], [10**18], "x", [[1]], [1.5], None],
               "data_offsets": [[0, 0], [5, 1], [0, 10**15], [-1, 3], "x", None, [0]]}  # fmt: skip
        entry[field] = choose.choice(odd[field])
        text = json.dumps(header).encode()
        data = len(text).to_bytes(8, "little") + text + data[8 + length :]
    elif kind < 0.85:
        data = choose.choice([0, 1, 2**32, 2**63, length - 1, length + 9]).to_bytes(
            8, "little") + data[8:]  # fmt: skip
    else:
        data = damaged(data, choose)
    file.write_bytes(data)


def damaged(data: bytes, choose) -> bytes:
    if choose.random() < 0.2:
        return data[: choose.randrange(len(data))]
    changed = bytearray(data)
    for _ in range(choose.randint(1, 8)):
        changed[choose.randrange(len(changed))] = choose.randrange(256)
    return bytes(changed)


@pytest.mark.slow
@pytest.mark.parametrize("part", ["config.json", "model.safetensors"])
def test_damaged_folders(whole, tmp_path, part):
    change = changed_config if part == "config.json" else changed_weights
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refused = 0
    for seed in range(COUNT):
        folder = shutil.copytree(whole, tmp_path / "model")
        change(folder / part, random.Random(seed))
        said, start = [], time.monotonic()
        for run in (parscale_mlx.load_model, Checkpoint):
            try:
                run(folder)
            except (ValueError, FileNotFoundError) as error:
                said.append(str(error))
                assert "\n" not in said[-1] and len(said[-1]) < 1000, (seed, said)
        if len(said) == 2:
            refused += 1
            assert said[0] == said[1], (seed, said)
        elif not said and seed % 10 == 0:
            export_onnx(folder, tmp_path / "out")
            shutil.rmtree(tmp_path / "out")
        assert time.monotonic() - start < 30, seed
        shutil.rmtree(folder)
        mx.clear_cache()
    assert refused > COUNT / 3
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert used < 1 << 20  # kilobytes: 1 GB
