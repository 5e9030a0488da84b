"""What the loader takes and what it refuses, each in one line that names the file."""

import json
import shutil
import sys

from parscale_mlx import load, load_model

import mlx.core as mx
import pytest
from helpers.golden_cases import GOLDEN, TOLERANCE, difference, load_golden
from parscale_core.checkpoint.folder import find_folder


@pytest.fixture
def folder(tmp_path):
    return shutil.copytree(GOLDEN / "p4", tmp_path / "model")


def change_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def change_weights(folder, change):
    weights = mx.load(str(folder / "model.safetensors"))
    mx.eval(weights)
    change(weights)
    mx.save_safetensors(str(folder / "model.safetensors"), weights)


def message(folder, kind=ValueError) -> str:
    with pytest.raises(kind) as error:
        load_model(folder)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 500
    return str(error.value)


def test_float32_on_the_cpu_and_the_stored_type_when_asked():
    if mx.default_device() == mx.cpu:
        model, config = load_model(GOLDEN / "p4-bf16")
        assert model.model.norm.weight.dtype == mx.float32
        assert config["parscale_n"] == 4
    model, _ = load_model(GOLDEN / "p4-bf16", dtype=mx.bfloat16)
    assert model.layers[0].self_attn.prefix_k.dtype == mx.bfloat16
    row = load_golden("p4-bf16").rows[0]
    logits = model(mx.array([row.ids]), cache=model.make_cache())[0]
    assert logits.dtype == mx.bfloat16
    assert difference(logits, row.logits) < 0.1


def test_lazy_loading_leaves_the_stored_type():
    model, _ = load_model(GOLDEN / "p4-bf16", lazy=True)
    assert model.model.norm.weight.dtype == mx.bfloat16


def test_a_model_saved_from_memory_loads_again(tmp_path):
    from mlx_lm.utils import save_config, save_model

    golden = load_golden("p4")
    save_model(tmp_path, golden.model)
    save_config(json.loads((golden.folder / "config.json").read_text()), tmp_path / "config.json")
    model, _ = load_model(tmp_path)
    row = golden.rows[0]
    assert difference(model(mx.array([row.ids]))[0], row.logits) < TOLERANCE


def test_streams_that_the_prefix_contradicts(folder):
    change_config(folder, parscale_n=8)
    assert "parscale_n 8" in message(folder)


def test_one_stream_with_a_prefix(folder):
    change_config(folder, parscale_n=1)
    assert "parscale_n 1" in message(folder)


def test_prefix_length_that_the_prefix_contradicts(folder):
    change_config(folder, parscale_n_tokens=47)
    assert "parscale_n_tokens 47" in message(folder)


def test_a_missing_tensor(folder):
    change_weights(folder, lambda w: w.pop("model.layers.1.mlp.up_proj.weight"))
    assert "model.layers.1.mlp.up_proj.weight" in message(folder)


def test_a_tensor_of_the_wrong_shape(folder):
    def cut(weights):
        weights["model.norm.weight"] = weights["model.norm.weight"][:32]

    change_weights(folder, cut)
    assert "model.norm.weight" in message(folder)


def test_a_tensor_too_many(folder):
    change_weights(folder, lambda w: w.update({"model.extra": mx.zeros(3)}))
    assert "model.extra" in message(folder)


def test_a_truncated_file(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    assert "model.safetensors" in message(folder)


def test_a_file_of_rubbish(folder):
    (folder / "model.safetensors").write_bytes(b"not a tensor in sight")
    assert "model.safetensors" in message(folder)


def test_an_unknown_architecture(folder):
    change_config(folder, model_type="gpt_neox")
    assert "model_type 'gpt_neox'" in message(folder)


def test_a_configuration_without_a_field(folder):
    config = json.loads((folder / "config.json").read_text())
    del config["hidden_size"]
    (folder / "config.json").write_text(json.dumps(config))
    assert "hidden_size" in message(folder)


@pytest.mark.parametrize("text", ["{", "[1, 2]", ""])
def test_a_configuration_that_is_none(folder, text):
    (folder / "config.json").write_text(text)
    assert "config.json" in message(folder)


def test_no_configuration(folder):
    (folder / "config.json").unlink()
    assert "no config.json" in message(folder, FileNotFoundError)


def test_no_weights(folder):
    (folder / "model.safetensors").unlink()
    assert "no weights" in message(folder, FileNotFoundError)


def test_a_shard_that_is_not_there(tmp_path):
    folder = shutil.copytree(GOLDEN / "p2-tied-sharded", tmp_path / "m")
    (folder / "model-00002-of-00003.safetensors").unlink()
    assert "model-00002-of-00003.safetensors" in message(folder, FileNotFoundError)


def test_an_index_that_points_out_of_the_folder(tmp_path):
    folder = shutil.copytree(GOLDEN / "p2-tied-sharded", tmp_path / "m")
    index = folder / "model.safetensors.index.json"
    index.write_text(index.read_text().replace("model-00002-of", "../model-00002-of"))
    assert "is not the name of a file in this folder" in message(folder)


def test_code_in_the_folder_is_not_run(folder):
    change_config(folder, model_file="evil.py")
    (folder / "evil.py").write_text("raise SystemExit('ran')")
    _, config = load_model(folder)
    assert "model_file" not in config


def test_a_pickle_that_would_run_code(tmp_path):
    pytest.importorskip("torch")
    import pickle

    class Evil:
        def __reduce__(self):
            return (print, ("ran",))

    folder = shutil.copytree(GOLDEN / "p2-torch-bin", tmp_path / "m")
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"w": Evil()}))
    assert "pytorch_model.bin" in message(folder)


def test_a_pickle_without_torch(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    text = message(GOLDEN / "p2-torch-bin", ImportError)
    assert "parscale[torch]" in text and "pytorch_model.bin" in text


def test_no_tokenizer(folder):
    with pytest.raises(FileNotFoundError, match="no tokenizer"):
        load(folder)


def test_a_broken_tokenizer(folder):
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match="tokenizer cannot be read"):
        load(folder)


def test_neither_a_folder_nor_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name in (str(tmp_path / "nowhere"), "nobody/no-such-model", "not a name"):
        with pytest.raises(FileNotFoundError, match="neither a folder here nor"):
            find_folder(name)
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    with pytest.raises(ValueError, match="is a file"):
        find_folder(tmp_path / "x.gguf")
