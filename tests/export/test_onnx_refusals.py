"""Bad input: one line that names the file or option, and nothing left behind."""

import json
import shutil
import sys

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from helpers.onnx_cases import GOLDEN, variant
from parscale_export import OnnxModel, export_onnx
from safetensors.numpy import load_file


def p4_tensors() -> dict[str, np.ndarray]:
    return load_file(GOLDEN / "p4" / "model.safetensors")


def no_config(folder):
    (folder / "config.json").unlink()


def bad_json(folder):
    (folder / "config.json").write_text("{")


def no_weights(folder):
    (folder / "model.safetensors").unlink()


def truncated(folder):
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])


def not_safetensors(folder):
    (folder / "model.safetensors").write_text("a page that a proxy sent instead")


def config(**fields):
    return lambda folder: variant(folder, **fields)


def lacking(name):
    def change(folder):
        tensors = p4_tensors()
        del tensors[name]
        variant(folder, tensors=tensors)

    return change


def misshapen(folder):
    tensors = p4_tensors()
    tensors["model.layers.1.mlp.up_proj.weight"] = np.zeros((3, 64), np.float32)
    variant(folder, tensors=tensors)


SOURCES = {
    "no config": (no_config, FileNotFoundError, r"no config\.json"),
    "bad json": (bad_json, ValueError, r"config\.json: not valid JSON"),
    "no weights": (no_weights, FileNotFoundError, "no weights"),
    "truncated": (truncated, ValueError, r"model\.safetensors: not a whole safetensors file"),
    "other file": (not_safetensors, ValueError, r"model\.safetensors: not a whole"),
    "other P": (config(parscale_n=2), ValueError, r"prefix_k has shape \[4, .* parscale_n 2"),
    "P of 1": (config(parscale_n=1), ValueError, "parscale_n 1"),
    "other prefix": (config(parscale_n_tokens=9), ValueError, "parscale_n_tokens 9"),
    "no P": (config(parscale_n="4"), ValueError, "parscale_n '4' is"),
    "architecture": (config(model_type="gpt2"), ValueError, "model_type 'gpt2'"),
    "rope": (config(rope_scaling={"type": "dynamic"}), ValueError, r"config\.json: .*'dynamic'"),
    "rope field": (config(rope_scaling={"type": "yarn"}), ValueError, r"'yarn' lacks 'factor'"),
    "window": (config(use_sliding_window=True), ValueError, "use_sliding_window"),
    "gptq": (
        config(quantization_config={"quant_method": "gptq"}), ValueError, r"config\.json: .*gptq"
    ),
    "lacking": (
        lacking("model.layers.2.mlp.down_proj.weight"), ValueError, r"lack model\.layers\.2\.mlp"
    ),
    "misshapen": (misshapen, ValueError, r"model\.safetensors: model\.layers\.1\.mlp\.up_proj"),
}  # fmt: skip


@pytest.mark.parametrize("name", SOURCES)
def test_sources_that_cannot_be_exported(tmp_path, name):
    change, kind, message = SOURCES[name]
    folder = variant(tmp_path / "model")
    change(folder)
    with pytest.raises(kind, match=message) as caught:
        export_onnx(folder, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


def test_shards_that_are_missing_or_elsewhere(tmp_path):
    folder = variant(tmp_path / "model", "p2-tied-sharded")
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    (folder / "model-00002-of-00003.safetensors").rename(tmp_path / "elsewhere.safetensors")
    with pytest.raises(FileNotFoundError, match=r"model-00002-of-00003\.safetensors: listed in"):
        export_onnx(folder, tmp_path / "out")
    for name, shard in content["weight_map"].items():
        if shard.startswith("model-00002"):
            content["weight_map"][name] = "../elsewhere.safetensors"
    index.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="is not the name of a file in this folder"):
        export_onnx(folder, tmp_path / "out")


def test_pickles_without_torch(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ImportError, match=r"pytorch_model\.bin: .*parscale\[torch\]"):
        export_onnx(GOLDEN / "p2-torch-bin", tmp_path / "out")


OPTIONS = {
    "precision": ({"precision": "int3"}, "precision 'int3' is not one of fp32"),
    "kv_layout": ({"kv_layout": "rows"}, "kv_layout 'rows' is not one of batch, heads"),
    "target": (
        {"target": "phone"},
        "target 'phone' is not one of cuda, cpu, genai, genai-cuda, web",
    ),
    "block_size": ({"block_size": 48}, "block_size 48"),
    "genai": ({"target": "genai", "kv_layout": "batch"}, "genai needs kv_layout heads"),
    "genai ops": ({"target": "genai", "ops": "standard"}, "genai needs ops fused"),
    "genai on cuda": ({"target": "genai-cuda", "ops": "standard"}, "genai-cuda needs ops fused"),
    "float32 on cuda": (
        {"target": "cuda", "precision": "fp32"},
        "cuda with ops fused needs activations fp16",
    ),
    "bf16 codes": (
        {"ops": "standard", "precision": "int4", "activations": "bf16"},
        "bf16 need ops fused",
    ),
    "embedding": ({"ops": "standard", "embedding_precision": "int4"}, "needs ops fused"),
    "w8a8 embedding": ({"embedding_precision": "w8a8"}, "'w8a8' is not one of"),
    "w8a8 on cuda": ({"target": "cuda", "precision": "w8a8"}, "w8a8 is for CPUs"),
    "calibrate": ({"precision": "int8", "calibrate": "x.txt"}, "calibrate is for precision w8a8"),
    "no tokenizer": ({"precision": "w8a8", "calibrate": "x.txt"}, "no tokenizer.json to read x"),
    "mixed": ({"precision": "fp16", "activations": "fp32"}, "does not go with activations"),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_options_that_do_not_go_together(tmp_path, name):
    options, message = OPTIONS[name]
    with pytest.raises(ValueError, match=message):
        export_onnx(GOLDEN / "p4", tmp_path / "out", **options)
    assert not any(tmp_path.iterdir())


def test_more_heads_in_a_row_than_cuda_takes(tmp_path):
    tensors = p4_tensors()
    for name, tensor in tensors.items():
        if "q_proj" in name:
            tensors[name] = np.repeat(tensor, 65, axis=0)
        if "o_proj.weight" in name:
            tensors[name] = np.repeat(tensor, 65, axis=1)
    folder = variant(tmp_path / "model", tensors=tensors, num_attention_heads=260, head_dim=16)
    with pytest.raises(ValueError, match="1040 heads in a row are more than the 1024"):
        export_onnx(folder, tmp_path / "out", target="genai-cuda")


def test_existing_outputs(tmp_path):
    output = tmp_path / "out"
    export_onnx(GOLDEN / "p4", output)
    before = (output / "model.onnx").read_bytes()
    with pytest.raises(FileExistsError, match=r"out exists already \(force=True"):
        export_onnx(GOLDEN / "p1", output)
    assert (output / "model.onnx").read_bytes() == before
    export_onnx(GOLDEN / "p1", output, force=True)
    assert OnnxModel(output).streams == 1
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("kind", ["folder", "empty folder", "file", "export"])
def test_what_appeared_meanwhile_is_kept(tmp_path, kind):
    """Another process writes to the same output while an export runs."""
    output = tmp_path / "out"

    def appear(what, done, total):
        if output.exists():
            return
        if kind == "file":
            output.write_text("a letter")
        elif kind == "export":
            export_onnx(GOLDEN / "p4", output)
        else:
            output.mkdir()
            if kind == "folder":
                (output / "letter.txt").write_text("dear reader")

    with pytest.raises(FileExistsError, match=r"out was made by another process meanwhile"):
        export_onnx(GOLDEN / "p1", output, progress=appear)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    if kind == "export":
        assert OnnxModel.describe(output)["streams"] == "4"
    if kind == "folder":
        assert (output / "letter.txt").read_text() == "dear reader"


def test_force_replaces_exports_only(tmp_path):
    papers = tmp_path / "papers"
    papers.mkdir()
    (papers / "thesis.txt").write_text("years of work")
    with pytest.raises(FileExistsError, match="not an ONNX export"):
        export_onnx(GOLDEN / "p4", papers, force=True)
    model = variant(papers / "model")
    (papers / "model.onnx").write_text("")
    with pytest.raises(ValueError, match="the model to export is in there"):
        export_onnx(model, papers, force=True)
    assert (papers / "thesis.txt").exists()


def test_a_failure_midway_keeps_the_old_export(tmp_path):
    output = tmp_path / "out"
    export_onnx(GOLDEN / "p4", output)

    def interrupt(what, done, total):
        if done == total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export_onnx(GOLDEN / "p1", output, force=True, progress=interrupt)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert OnnxModel(output).streams == 4


@pytest.fixture
def export(tmp_path):
    return export_onnx(GOLDEN / "p4", tmp_path / "out")


def point_outside(folder, location):
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = location
    onnx.save(model, folder / "model.onnx")


def test_external_data_missing_or_truncated(export):
    data = export / "model.onnx.data"
    whole = data.read_bytes()
    data.write_bytes(whole[:-1])
    with pytest.raises(ValueError, match=r"model\.onnx\.data: truncated"):
        OnnxModel(export)
    data.unlink()
    with pytest.raises(FileNotFoundError, match=r"model\.onnx\.data: missing"):
        OnnxModel(export)


@pytest.mark.parametrize("relative", [True, False])
def test_external_data_outside_the_folder(export, tmp_path, relative):
    shutil.copy(export / "model.onnx.data", tmp_path / "elsewhere")
    point_outside(export, "../elsewhere" if relative else str(tmp_path / "elsewhere"))
    with pytest.raises(ValueError, match="outside its folder"):
        OnnxModel(export)


def test_external_data_behind_a_link_out_of_the_folder(export, tmp_path):
    data = export / "model.onnx.data"
    data.rename(tmp_path / "elsewhere")
    data.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="outside its folder"):
        OnnxModel(export)


def test_what_is_not_an_export(tmp_path, export):
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        OnnxModel(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"no model\.onnx"):
        OnnxModel(GOLDEN / "p4")
    with pytest.raises(ValueError, match=r"not an \.onnx file"):
        OnnxModel(export / "config.json")
    (export / "model.onnx").write_text("not a graph")
    with pytest.raises(ValueError, match="not an ONNX graph"):
        OnnxModel(export)
    node = onnx.helper.make_node("Identity", ["x"], ["y"])
    x, y = (onnx.helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, [1]) for n in "xy")
    onnx.save(
        onnx.helper.make_model(onnx.helper.make_graph([node], "g", [x], [y])), export / "model.onnx"
    )
    with pytest.raises(ValueError, match="not a graph that parscale export-onnx wrote"):
        OnnxModel(export)


def test_providers_that_are_not_there(export):
    with pytest.raises(ValueError, match="provider 'tpu' is not in this onnxruntime"):
        OnnxModel(export, provider="tpu")
    try:
        OnnxModel(export, provider="cuda")
    except ValueError as error:
        assert "cuda" in str(error) and "\n" not in str(error)
        with pytest.raises(ValueError, match="cuda_graph needs the CUDA provider"):
            OnnxModel(export, cuda_graph=True)
    else:
        assert "CUDAExecutionProvider" in ort.get_available_providers()


def test_bfloat16_on_the_cpu(tmp_path):
    folder = export_onnx(GOLDEN / "p4", tmp_path / "out", precision="bf16")
    with pytest.raises(ValueError, match="CPUExecutionProvider has no bfloat16"):
        OnnxModel(folder, provider="cpu")


def test_prompts_that_cannot_be_run(export):
    model = OnnxModel(export)
    with pytest.raises(ValueError, match="prompt 2 is empty"):
        model.generate([[1], []])
    with pytest.raises(ValueError, match="token 320 is not in the vocabulary of 320"):
        model.generate([[320]])
    with pytest.raises(ValueError, match=r"more than the 512 that model\.onnx was exported for"):
        model.generate([[1]], max_tokens=9000)
    assert model.generate([]) == []
