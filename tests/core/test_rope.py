"""Rotary embeddings of every kind, in both engines, against transformers."""

import re

import parscale_mlx

import mlx.core as mx
import numpy as np
import pytest
from helpers.made_folders import (
    LONGROPE,
    ROPES,
    SIZES,
    YARN,
    add_streams,
    expected,
    expected_of_streams,
    make,
    tokens,
)
from parscale_core.checkpoint.config import ModelConfig
from parscale_export import OnnxModel, export_onnx

LENGTHS = (12, 40)  # within the original context and beyond it
TOLERANCE = 2e-4


QUICK = ("llama3", "yarn attention_factor", "yarn mscale", "longrope")
SLOW = [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in ROPES]


@pytest.fixture(scope="module", params=SLOW)
def folder(request, tmp_path_factory):
    family = "qwen2" if "yarn" in request.param else "llama"
    return make(tmp_path_factory.mktemp("model") / "m", family, **ROPES[request.param])


def worst(ours, folder) -> float:
    return max(np.abs(ours(ids) - expected(folder, ids)).max() for ids in map(tokens, LENGTHS))


def test_mlx(folder):
    model, _ = parscale_mlx.load_model(folder, dtype=mx.float32)
    assert worst(lambda ids: np.array(model(mx.array([ids]))[0]), folder) < TOLERANCE
    # Through a cache, which says where a token stands.
    assert (
        worst(lambda ids: np.array(model(mx.array([ids]), cache=model.make_cache())[0]), folder)
        < TOLERANCE
    )


@pytest.mark.parametrize("rope", ["longrope", "yarn attention_factor"])
def test_streams_beyond_the_original_context(tmp_path, rope):
    one = make(tmp_path / "m", "llama", **ROPES[rope])
    three, ids = add_streams(one, 3, 5), tokens(20)
    wanted = expected_of_streams(one, three, ids)
    model, _ = parscale_mlx.load_model(three, dtype=mx.float32)
    assert np.abs(np.array(model(mx.array([ids]))[0]) - wanted).max() < TOLERANCE
    for ops in ("fused", "standard"):
        exported = OnnxModel(export_onnx(three, tmp_path / ops, ops=ops, all_logits=True))
        assert np.abs(exported.logits(ids) - wanted).max() < TOLERANCE


@pytest.mark.parametrize("ops", ["fused", "standard"])
def test_onnx(folder, tmp_path, ops):
    model = OnnxModel(export_onnx(folder, tmp_path / "out", ops=ops, all_logits=True))
    assert worst(model.logits, folder) < TOLERANCE


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"rope_scaling": YARN | {"beta": 3}}, "rope_scaling: 'beta' is not known"),
        ({"rope_parameters": YARN | {"short_factor": [1]}}, "rope_parameters: 'short_factor'"),
        ({"rope_scaling": {"type": "yarn"}}, "rope_type 'yarn' lacks 'factor'"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2}}, "rope_type 'dynamic' is not one of"),
        ({"rope_scaling": {"rope_type": None}}, "rope_type None is not one of"),
        ({"rope_scaling": {"rope_type": ["yarn"]}}, "is not one of"),
        ({"rope_scaling": "yarn"}, "rope_scaling is 'yarn', where an object"),
        ({"rope_scaling": YARN | {"factor": "4"}}, "factor is '4', where a number"),
        ({"rope_scaling": YARN | {"factor": float("nan")}}, "factor is nan"),
        ({"rope_scaling": YARN | {"attention_factor": -1.0}}, "attention_factor is -1.0"),
        ({"rope_scaling": LONGROPE | {"long_factor": [1.0]}}, "long_factor is not a list of 8"),
        ({"rope_theta": "10000"}, "rope_theta is '10000', where a number"),
        ({"rope_theta": None}, "rope_theta is None, where a number"),
        ({"rope_theta": True}, "rope_theta is True"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5 is not supported"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor 0.5"),
        ({"rope_parameters": {"full_attention": YARN}}, "'full_attention' is not known"),
    ],
)
def test_what_is_not_understood_is_refused(fields, words):
    with pytest.raises(ValueError, match=re.escape(words)) as error:
        ModelConfig.from_dict({"model_type": "llama"} | SIZES | fields)
    assert "\n" not in str(error.value)
