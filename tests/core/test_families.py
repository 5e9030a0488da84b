"""Every model family in both engines, with one stream and with several, against transformers."""

import json

import parscale_mlx
from parscale_mlx.benchmark.models import mlx_lm_twin
from parscale_mlx.convert import convert

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from helpers.made_folders import SIZES, add_streams, expected, expected_of_streams, make, tokens
from parscale_core.checkpoint.config import ModelConfig
from parscale_export import OnnxModel, export_onnx

FAMILIES = {
    "qwen2": {},
    "qwen3": {"head_dim": 32},
    "qwen3 with biases": {"head_dim": 16, "attention_bias": True, "tie_word_embeddings": True},
    "llama with biases": {"attention_bias": True, "mlp_bias": True},
    "mistral": {"sliding_window": None, "head_dim": 32},
    "smollm3": {"num_hidden_layers": 4, "no_rope_layers": [1, 0, 1, 0]},
    "granite": {
        "embedding_multiplier": 3.0, "attention_multiplier": 0.2, "residual_multiplier": 0.4,
        "logits_scaling": 2.5, "attention_bias": True,
    },
}  # fmt: skip
IDS, TOLERANCE = tokens(20), 2e-4


@pytest.fixture(scope="module", params=FAMILIES)
def folders(request, tmp_path_factory):
    """A model of transformers' own making, and the same with three streams."""
    root = tmp_path_factory.mktemp("families")
    one = make(root / "m", request.param.split()[0], **FAMILIES[request.param])
    return one, add_streams(one, 3, 5)


def close(actual, wanted) -> bool:
    return actual.shape == wanted.shape and np.abs(actual - wanted).max() < TOLERANCE


def test_one_stream(folders, tmp_path):
    one, wanted = folders[0], expected(folders[0], IDS)
    model, _ = parscale_mlx.load_model(one, dtype=mx.float32)
    assert close(np.array(model(mx.array([IDS]))[0]), wanted)
    for ops in ("fused", "standard"):
        export_onnx(one, tmp_path / ops, ops=ops, all_logits=True)
        assert close(OnnxModel(tmp_path / ops).logits(IDS), wanted), ops


def test_mlx_lms_own_class(folders, tmp_path, request):
    """It reads what is converted, and it is what ``bench`` measures beside."""
    one, wanted = folders[0], expected(folders[0], IDS)
    model, config = parscale_mlx.load_model(one, dtype=mx.float32)
    if "qwen3 with biases" in request.node.name:  # which mlx-lm has not
        with pytest.raises(ValueError, match="mlx-lm's own class of qwen3 has other tensors"):
            mlx_lm_twin(model, config)
        return
    convert(one, tmp_path / "mlx")
    theirs, _ = mlx_lm.utils.load_model(tmp_path / "mlx")
    for other in (theirs, mlx_lm_twin(model, config)):
        assert close(np.array(other(mx.array([IDS]))[0]), wanted)


def test_streams_in_mlx(folders):
    one, three = folders
    wanted = expected_of_streams(one, three, IDS)
    model, _ = parscale_mlx.load_model(three, dtype=mx.float32)
    assert close(np.array(model(mx.array([IDS]))[0]), wanted)
    cache = model.make_cache()
    parts = [model(mx.array([part]), cache=cache)[0] for part in (IDS[:7], IDS[7:8], IDS[8:])]
    assert close(np.array(mx.concatenate(parts)), wanted)


@pytest.mark.parametrize("ops", ["fused", "standard"])
@pytest.mark.parametrize("kv_layout", ["batch", "heads"])
def test_streams_in_onnx(folders, tmp_path, ops, kv_layout):
    one, three = folders
    wanted = expected_of_streams(one, three, IDS)
    export_onnx(three, tmp_path / "out", ops=ops, kv_layout=kv_layout, all_logits=True)
    model = OnnxModel(tmp_path / "out")
    assert close(model.logits(IDS), wanted)
    assert close(model.continuation_logits(IDS[:9], IDS[9:]), wanted[8:])


@pytest.mark.parametrize(
    ("family", "fields", "words"),
    [
        ("mistral", {"sliding_window": 16}, "sliding_window 16 is less than"),
        ("mistral", {"max_position_embeddings": 8192}, "sliding_window 4096 is less than"),
        ("smollm3", {"no_rope_layers": [1]}, "no_rope_layers is not a list of 2"),
        ("smollm3", {"no_rope_layer_interval": 0}, "no_rope_layer_interval is 0"),
        ("granite", {"logits_scaling": "8"}, "logits_scaling is '8'"),
        ("granite", {"logits_scaling": 0}, "logits_scaling is 0"),
        ("granite", {"attention_multiplier": 0}, "attention_multiplier is 0"),
        ("qwen3", {"use_sliding_window": True, "sliding_window": 8}, "use_sliding_window true"),
        ("smollm3", {"use_sliding_window": True}, "use_sliding_window true"),
        ("gemma2", {}, "model_type 'gemma2' is not one of qwen2"),
    ],
    ids=str,
)
def test_what_is_not_computed_is_refused(family, fields, words):
    with pytest.raises(ValueError) as error:
        ModelConfig.from_dict({"model_type": family} | SIZES | fields)
    assert words in str(error.value)


def test_what_a_family_leaves_out_means_what_transformers_means(tmp_path):
    """A config.json without the fields whose defaults differ between families."""
    for family, gone in {
        "qwen3": ("head_dim", "rope_parameters"),
        "smollm3": ("no_rope_layers", "layer_types", "rope_parameters", "tie_word_embeddings"),
        "granite": ("rope_parameters", "attention_multiplier"),
    }.items():
        extra = {"num_hidden_layers": 4, "tie_word_embeddings": True} if family == "smollm3" else {}
        extra |= {"head_dim": 128} if family == "qwen3" else {}
        folder = make(tmp_path / family, family, **extra)
        file = folder / "config.json"
        config = {k: v for k, v in json.loads(file.read_text()).items() if k not in gone}
        file.write_text(json.dumps(config))
        model, _ = parscale_mlx.load_model(folder, dtype=mx.float32)
        assert close(np.array(model(mx.array([IDS]))[0]), expected(folder, IDS)), family
