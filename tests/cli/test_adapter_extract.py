"""``parscale adapter extract`` and ``show``: streams out of checkpoints in the published layout."""

import json

import numpy as np
import pytest
from helpers.tiny_models import GOLDEN, error_line
from safetensors.numpy import load_file, save_file

STREAMS = ("prefix_k", "prefix_v", "aggregate_layer")
RUN = ("--prompt", "Hi", "-n", 9, "--json")


@pytest.fixture
def plain(tmp_path):
    """Make the backbone of a golden case, as it would be published by itself."""

    def make(case: str):
        folder = tmp_path / f"{case}-backbone"
        folder.mkdir()
        config = json.loads((GOLDEN / case / "config.json").read_text())
        config = {k: v for k, v in config.items() if not k.startswith(("parscale", "auto_map"))}
        config |= {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}
        (folder / "config.json").write_text(json.dumps(config))
        tensors = {}
        for file in (GOLDEN / case).glob("model*.safetensors"):
            tensors |= load_file(file)
        tensors = {k: v for k, v in tensors.items() if not any(part in k for part in STREAMS)}
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder

    return make


def test_what_is_taken_out_makes_the_same_model(parscale, model, backbone, tmp_path):
    result = parscale("adapter", "extract", model, "--backbone", backbone, "-o", tmp_path / "p4")
    assert result.exit_code == 0, result.output
    assert "4 streams" in result.stdout and "agree in every bit" in result.stdout
    whole = parscale("generate", "--model", model, *RUN)
    again = parscale("generate", "--model", backbone, "--adapter", tmp_path / "p4", *RUN)
    assert json.loads(again.stdout)["text"] == json.loads(whole.stdout)["text"]


@pytest.mark.parametrize("case", ["p2-tied-sharded", "p4-bf16", "p8-short-prefix"])
def test_published_layouts(parscale, plain, tmp_path, case):
    backbone = plain(case)
    parscale("adapter", "extract", GOLDEN / case, "--backbone", backbone, "-o", tmp_path / "a")
    fused = parscale(
        "fuse", "--model", backbone, "--adapter", tmp_path / "a", "-o", tmp_path / "fused"
    )
    assert fused.exit_code == 0, fused.output
    back = parscale("convert", tmp_path / "fused", "--to", "hf", "-o", tmp_path / "published")
    assert back.exit_code == 0, back.output
    published = load_file(tmp_path / "published" / "model.safetensors")
    original = {}
    for file in (GOLDEN / case).glob("model*.safetensors"):
        original |= load_file(file)
    assert set(published) == set(original)
    assert all(np.array_equal(published[name], original[name]) for name in original)


def test_pickles_are_taken_out_too(parscale, plain, tmp_path):
    torch = pytest.importorskip("torch", reason="pytorch_model.bin needs PyTorch")
    folder = tmp_path / "backbone"
    folder.mkdir()
    config = json.loads((GOLDEN / "p2-torch-bin" / "config.json").read_text())
    config["parscale_n"] = 1
    (folder / "config.json").write_text(json.dumps(config))
    tensors = torch.load(GOLDEN / "p2-torch-bin" / "pytorch_model.bin", weights_only=True)
    kept = {k: v.numpy() for k, v in tensors.items() if not any(part in k for part in STREAMS)}
    save_file(kept, folder / "model.safetensors")
    run = ("adapter", "extract", GOLDEN / "p2-torch-bin", "--backbone", folder, "--json")
    result = parscale(*run, "-o", tmp_path / "a")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["different"] == 0


def test_another_backbone_is_refused_unless_it_is_near(parscale, plain, tmp_path):
    backbone = plain("p4")
    tensors = load_file(backbone / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"] + np.float32(0.25)
    save_file(tensors, backbone / "model.safetensors")
    run = ("adapter", "extract", GOLDEN / "p4", "--backbone", backbone, "-o", tmp_path / "a")
    line = error_line(parscale(*run))
    assert "model.norm.weight by as much as 0.25" in line and not (tmp_path / "a").exists()
    near = parscale(*run, "--tolerance", 0.3)
    assert near.exit_code == 0 and "differ in 1 of" in near.stdout
    tensors["model.norm.weight"][0] = np.nan
    save_file(tensors, backbone / "model.safetensors")
    assert "inf" in error_line(parscale(*run, "--tolerance", 1, "--force"))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"rope_theta": 5e5}, "its rotary embedding (default, rope_theta 500000) is not that of"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "(linear, rope_theta 10000)"),
        ({"rms_norm_eps": 1e-3}, "rms_norm_eps is 0.001, where"),
        ({"num_attention_heads": 8, "num_key_value_heads": 4}, "num_attention_heads is 8, where"),
        ({"rope_traditional": True}, "rope_traditional is True, where"),
    ],
    ids=str,
)
def test_the_same_tensors_that_compute_other_numbers(parscale, plain, tmp_path, fields, words):
    backbone = plain("p4")
    config = json.loads((backbone / "config.json").read_text())
    (backbone / "config.json").write_text(json.dumps(config | fields))
    run = ("adapter", "extract", GOLDEN / "p4", "--backbone", backbone, "-o", tmp_path / "a")
    assert words in error_line(parscale(*run))


def test_what_has_no_streams_or_other_sizes(parscale, plain, tmp_path):
    backbone, out = plain("p4"), tmp_path / "a"
    run = ("adapter", "extract")
    assert "one stream" in error_line(
        parscale(*run, GOLDEN / "p1", "--backbone", backbone, "-o", out)
    )
    assert "4 streams" in error_line(
        parscale(*run, GOLDEN / "p4", "--backbone", GOLDEN / "p4", "-o", out)
    )
    assert "where" in error_line(
        parscale(*run, GOLDEN / "p8-short-prefix", "--backbone", backbone, "-o", out)
    )
    out.mkdir()
    (out / "file").touch()
    assert "exists already" in error_line(
        parscale(*run, GOLDEN / "p4", "--backbone", backbone, "-o", out)
    )


def test_show(parscale, adapter):
    shown = parscale("adapter", "show", adapter)
    assert shown.exit_code == 0 and "4 streams with" in shown.stdout
    about = json.loads(parscale("adapter", "show", adapter, "--json").stdout)
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert about["backbone_sha256"] == config["backbone"]["sha256"]
    assert about["bytes"] == sum(
        v.nbytes for v in load_file(adapter / "adapters.safetensors").values()
    )
    assert "not a stream adapter" in error_line(parscale("adapter", "show", GOLDEN / "p4"))
