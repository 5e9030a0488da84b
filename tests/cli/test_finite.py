"""Weights and logits that hold NaN or infinity: one line from every command, nothing written."""

import hashlib
import json
import shutil

import numpy as np
import onnx
import pytest
from helpers.tiny_models import error_line
from parscale_export import export_onnx
from safetensors.numpy import load_file, save_file

UP = "model.layers.1.mlp.up_proj.weight"


def spoilt(folder, file, name, value):
    """A copy of ``folder`` with one number of one tensor replaced."""

    def make(target):
        shutil.copytree(folder, target)
        tensors = load_file(target / file)
        tensors[name].flat[3] = value
        save_file(tensors, target / file)
        return target

    return make


@pytest.fixture
def broken(model, tmp_path):
    return spoilt(model, "model.safetensors", UP, np.nan)(tmp_path / "broken")


@pytest.fixture
def large(model, tmp_path):
    return spoilt(model, "model.safetensors", UP, 1e5)(tmp_path / "large")


def test_a_small_weight_with_nan(parscale, model, tmp_path):
    broken = spoilt(model, "model.safetensors", "model.norm.weight", np.nan)(tmp_path / "broken")
    failed = parscale("export-onnx", "--model", broken, "-o", tmp_path / "out")
    assert failed.exit_code == 1
    assert "model.norm.weight has NaN or infinity" in error_line(failed)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "command",
    [
        "generate --model MODEL -p text",
        "generate --model MODEL -p one -p two",
        "perplexity TEXT --model MODEL",
        "evaluate --model MODEL --code PROBLEMS --run-generated-code",
        "serve --model MODEL --port 0",
        "bench --model MODEL",
        "convert MODEL -o OUT",
        "convert MODEL -o OUT --quantize --q-group-size 32",
        "convert MODEL -o OUT --to hf",
        "export-onnx --model MODEL -o OUT",
        "export-onnx --model MODEL -o OUT --precision int8 --ops standard",
        "export-onnx --model MODEL -o OUT --target web",
        "verify EXPORT --against MODEL",
        "train --stage streams --train-all --model MODEL --data TEXT --seq-length 32 -o OUT",
    ],
)
def test_weights_with_nan(parscale, model, broken, tmp_path, command):
    (tmp_path / "text.txt").write_text("some text " * 200)
    (tmp_path / "problems.jsonl").write_text(
        '{"task_id": 1, "prompt": "def f():\\n", "entry_point": "f", "test": ""}'
    )
    words = {"MODEL": broken, "OUT": tmp_path / "out", "TEXT": tmp_path / "text.txt"}
    words["PROBLEMS"], words["EXPORT"] = tmp_path / "problems.jsonl", tmp_path / "onnx"
    if "EXPORT" in command:
        export_onnx(model, tmp_path / "onnx")
    before = sorted(tmp_path.iterdir())
    result = parscale(*(words.get(word, word) for word in command.split()))
    assert result.exit_code == 1 and "NaN" in error_line(result)
    assert result.stdout == "" and sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    "command",
    [
        "convert MODEL -o OUT --dtype float16",
        "convert MODEL -o OUT --dtype float16 --quantize --q-group-size 32",
        "export-onnx --model MODEL -o OUT --precision fp16",
    ],
)
def test_weights_beyond_float16(parscale, large, tmp_path, command):
    words = {"MODEL": large, "OUT": tmp_path / "out"}
    result = parscale(*(words.get(word, word) for word in command.split()))
    line = error_line(result)
    assert result.exit_code == 1 and "65504" in line and "layers.1.mlp" in line
    assert [path.name for path in tmp_path.iterdir()] == ["large"]
    in_full = parscale("export-onnx", "--model", large, "-o", tmp_path / "out")
    assert in_full.exit_code == 0, in_full.output


def test_an_adapter_with_nan(parscale, backbone, adapter, tmp_path):
    name = "model.layers.0.self_attn.prefix_v"
    folder = spoilt(adapter, "adapters.safetensors", name, np.nan)(tmp_path / "adapter")
    own = ("--model", backbone, "--adapter", folder)
    for command in (["generate", "-p", "a"], ["fuse", "-o", tmp_path / "out"]):
        result = parscale(command[0], *own, *command[1:])
        assert result.exit_code == 1 and "NaN" in error_line(result)
        assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_an_export_with_nan(parscale, model, tmp_path):
    folder = export_onnx(model, tmp_path / "onnx", all_logits=True)
    with (folder / "model.onnx.data").open("r+b") as file:
        file.write(b"\xff" * 64 * 4 * 320)
    damaged = error_line(parscale("verify", folder, "--against", model))
    assert "not the data that model.onnx was written with" in damaged
    _note_the_hash(folder)
    result = parscale("verify", folder, "--against", model, "--json")
    report = json.loads(result.stdout, parse_constant=lambda name: pytest.fail(name))
    assert result.exit_code == 1 and "NaN" in error_line(result)
    assert report["within_tolerance"] is False and report["max_difference"] is None
    (tmp_path / "text.txt").write_text("some text")
    result = parscale("perplexity", tmp_path / "text.txt", "--model", folder)
    assert result.exit_code == 1 and "NaN" in error_line(result) and result.stdout == ""


def _note_the_hash(folder) -> None:
    graph = onnx.load(folder / "model.onnx", load_external_data=False)
    (entry,) = (e for e in graph.metadata_props if e.key == "parscale.sha256.model.onnx.data")
    entry.value = hashlib.sha256((folder / "model.onnx.data").read_bytes()).hexdigest()
    onnx.save(graph, folder / "model.onnx")
