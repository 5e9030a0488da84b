"""One stream with a prefix: as mlx-lm's own class with the same past in its cache."""

import json

import parscale_mlx
from parscale_mlx.adapter import load_adapter, save_adapter, take_streams, with_streams
from parscale_mlx.convert import convert
from parscale_mlx.fuse import fuse
from parscale_mlx.graft import graft, grafted_config, make_prefixes
from parscale_mlx.load import load_model
from parscale_mlx.training import TrainSettings, train

import mlx.core as mx
import numpy as np
import pytest
from helpers.golden_cases import GOLDEN, difference
from helpers.training_files import write_model
from mlx.utils import tree_flatten
from mlx_lm.models import qwen2
from mlx_lm.models.cache import make_prompt_cache
from parscale_core.checkpoint.adapter import find_adapters, fingerprint
from parscale_core.checkpoint.config import ModelConfig

PREFIX = 7
PAST = [[5, 9, 2, 77, 31, 8, 1]]
IDS = [[4, 90, 12, 6, 33, 2], [8, 8, 1, 50, 3, 9]]


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    """A plain model's folder, an adapter with one stream over it, and mlx-lm's own logits.

    The prefix is what the model holds of a text, so its logits are those after that text.
    """
    folder = tmp_path_factory.mktemp("models") / "plain"
    convert(GOLDEN / "p1", folder)
    config = json.loads((folder / "config.json").read_text())
    theirs = qwen2.Model(qwen2.ModelArgs.from_dict(config | {"model_type": "qwen2"}))
    model, _ = load_model(folder)
    theirs.load_weights(tree_flatten(model.parameters()))
    whole = mx.concatenate([mx.repeat(mx.array(PAST), 2, axis=0), mx.array(IDS)], axis=1)
    expected = theirs(whole)[:, PREFIX:]
    mx.eval(expected)
    prefixes = make_prefixes(model, mx.array(PAST))
    graft(model, grafted_config(config, streams=1, prefix_length=PREFIX), prefixes)
    adapter = take_streams(model, backbone="plain", backbone_sha256=fingerprint(folder))
    save_adapter(folder.parent / "prefix", adapter)
    return folder, folder.parent / "prefix", expected


def test_an_adapter_of_one_stream(case):
    folder, path, expected = case
    adapter = load_adapter(path, backbone=folder)
    assert len(adapter.weights) == 2 * len(load_model(folder)[0].layers)
    model = with_streams(load_model(folder)[0], adapter)
    assert difference(model(mx.array(IDS)), expected) < 5e-5
    cache = make_prompt_cache(model)
    parts = [model(mx.array(IDS)[:, n : n + 2], cache) for n in (0, 2, 4)]
    assert difference(mx.concatenate(parts, axis=1), expected) < 5e-5
    assert model.aggregation_weights(mx.array(IDS)).tolist() == [[[1.0]] * 6] * 2
    assert find_adapters(folder, [path]) == {1: path}


@pytest.mark.parametrize("with_model_file", [False, True])
def test_fused_and_converted_folders(case, tmp_path, with_model_file):
    folder, path, expected = case
    fuse(folder, path, tmp_path / "fused")
    config = json.loads((tmp_path / "fused" / "config.json").read_text())
    assert (config["parscale_n"], config["parscale_n_tokens"]) == (1, PREFIX)
    convert(tmp_path / "fused", tmp_path / "again", with_model_file=with_model_file)
    model, _ = load_model(tmp_path / "again")
    assert difference(model(mx.array(IDS)), expected) < 5e-5
    if with_model_file:
        from mlx_lm.utils import load_model as mlx_lm_load

        theirs, _ = mlx_lm_load(tmp_path / "again", trust_remote_code=True)
        logits = theirs(mx.array(IDS), cache=make_prompt_cache(theirs))
        assert difference(logits, expected) < 5e-5
    with pytest.raises(ValueError, match="no prefix for one stream"):
        convert(tmp_path / "fused", tmp_path / "published", to="hf")
    with pytest.raises(ValueError, match="1 stream of its own"):
        with_streams(model, load_adapter(path))


@pytest.mark.parametrize("ops", ["fused", "standard"])
@pytest.mark.parametrize("kv_layout", ["batch", "heads"])
def test_exports(case, tmp_path, ops, kv_layout):
    export = pytest.importorskip("parscale_export")
    folder, path, expected = case
    fuse(folder, path, tmp_path / "fused")
    choices = dict(ops=ops, kv_layout=kv_layout, all_logits=True)
    export.export_onnx(tmp_path / "fused", tmp_path / "onnx", **choices)
    model = export.OnnxModel(tmp_path / "onnx")
    assert (model.streams, model.prefix_length) == (1, PREFIX)
    for ids, row in zip(IDS, np.array(expected), strict=True):
        assert np.abs(model.logits(ids) - row).max() < 5e-5
    if ops == "fused":
        with pytest.raises(ValueError, match="prefix for one stream"):
            export.export_onnx(folder, tmp_path / "both", adapters=[path])


def test_training_a_prefix(tmp_path):
    (tmp_path / "text.txt").write_text("a b c d e f g h " * 200)
    folder = write_model(tmp_path / "base")
    settings = TrainSettings(
        stage="streams", data=[str(tmp_path / "text.txt")], output=str(tmp_path / "run"),
        model=str(folder), streams=1, prefix_length=5, seq_length=16, batch_size=2, steps=6,
        lr=3e-2, save_every=3,
    )  # fmt: skip
    result = train(settings)
    assert result.valid_loss < result.valid_loss_before
    adapter = load_adapter(result.output, backbone=folder)
    assert (adapter.streams, adapter.prefix_length) == (1, 5)
    model, _ = parscale_mlx.load(folder, adapter_path=result.output)
    assert "aggregator" not in model.model


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"parscale_prefix": "yes"}, "parscale_prefix 'yes'"),
        ({"parscale_n": 2, "parscale_prefix": False}, "parscale_prefix false"),
        ({"parscale_n_tokens": 0, "parscale_prefix": True}, "parscale_n_tokens 0"),
    ],
)
def test_what_is_refused(changes, word):
    config = json.loads((GOLDEN / "p1" / "config.json").read_text())
    with pytest.raises(ValueError, match=word):
        ModelConfig.from_dict(config | changes)
    assert ModelConfig.from_dict(config).prefix_length == 0
