"""Stream adapters on the command line: generate, chat and fuse; and convert --to hf."""

import json
import shutil

from helpers.tiny_models import GOLDEN, error_line
from safetensors.numpy import load_file, save_file

RUN = ("--prompt", "Hi", "-n", 9, "--json")


def text(result) -> str:
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)["text"]


def test_generate_with_an_adapter(parscale, model, backbone, adapter):
    whole = text(parscale("generate", "--model", model, *RUN))
    run = ("generate", "--model", backbone, *RUN)
    plain = text(parscale(*run))
    assert plain != whole
    assert text(parscale(*run, "--adapter", adapter)) == whole
    assert text(parscale(*run, "--adapter", adapter, "--streams", 4)) == whole
    assert text(parscale(*run, "--adapter", adapter, "--streams", 1)) == plain


def test_adapters_that_came_with_the_model(parscale, model, backbone, adapter, tmp_path):
    folder = shutil.copytree(backbone, tmp_path / "m")
    shutil.copytree(adapter, folder / "adapters" / "four")
    run = ("generate", "--model", folder, *RUN)
    assert text(parscale(*run)) == text(parscale("generate", "--model", model, *RUN))
    assert text(parscale(*run, "--streams", 1)) == text(
        parscale("generate", "--model", backbone, *RUN)
    )


def test_chat_with_an_adapter(parscale, model, backbone, adapter):
    run = ("chat", "-n", 9, "--model")
    whole = parscale(*run, model, input="Hi\n")
    assert whole.exit_code == 0
    assert parscale(*run, backbone, "--adapter", adapter, input="Hi\n").stdout == whole.stdout


def test_adapters_that_do_not_suit(parscale, model, plain_model, backbone, adapter):
    result = parscale("generate", "--model", plain_model, *RUN, "--adapter", adapter)
    assert result.exit_code == 1 and "belongs to another backbone" in error_line(result)
    result = parscale("generate", "--model", model, *RUN, "--streams", 2)
    assert result.exit_code == 1 and "has 2 streams, only 4" in error_line(result)
    result = parscale("generate", "--model", backbone, *RUN, "--adapter", backbone)
    assert result.exit_code == 1 and "not a stream adapter" in error_line(result)
    result = parscale("generate", "--model", backbone, *RUN, "--adapter", "/nowhere")
    assert result.exit_code == 2 and "--adapter" in error_line(result)


def test_a_prompt_cache_of_another_adapter(parscale, backbone, adapter, tmp_path):
    other = shutil.copytree(adapter, tmp_path / "other")
    weights = load_file(other / "adapters.safetensors")
    weights["model.layers.0.self_attn.prefix_k"] *= 1.1
    save_file(weights, other / "adapters.safetensors")
    run = ("generate", "--model", backbone, *RUN, "--prompt-cache", tmp_path / "c.safetensors")
    assert parscale(*run, "--adapter", adapter).exit_code == 0
    assert "another model" in error_line(parscale(*run, "--adapter", other))


def test_fuse(parscale, model, backbone, adapter, tmp_path):
    out = tmp_path / "out"
    run = ("fuse", "--model", backbone, "--adapter", adapter, "-o", out)
    result = parscale(*run)
    assert (result.exit_code, result.stdout) == (0, f"Wrote {out}\n")
    assert text(parscale("generate", "--model", out, *RUN)) == text(
        parscale("generate", "--model", model, *RUN)
    )
    assert "exists already" in error_line(parscale(*run))
    assert parscale(*run, "--force").exit_code == 0


def test_convert_to_the_published_layout(parscale, model, tmp_path):
    assert parscale("convert", model, "-o", tmp_path / "hf", "--to", "hf").exit_code == 0
    weights, golden = (load_file(f / "model.safetensors") for f in (tmp_path / "hf", GOLDEN / "p4"))
    assert weights.keys() == golden.keys()
    result = parscale("convert", model, "-o", tmp_path / "q", "--to", "hf", "-q")
    assert result.exit_code == 2 and "--to hf" in error_line(result)


def test_the_default_model_brings_its_adapters(parscale, backbone, adapter, tmp_path, monkeypatch):
    from parscale_mlx.adapter import load_adapter, save_adapter
    from parscale_mlx.convert import convert

    from parscale_core.checkpoint.adapter import fingerprint
    from parscale_core.convert_settings import Quantization

    folder = tmp_path / "default"
    convert(backbone, folder, quantization=Quantization(bits=8, group_size=32), dtype="float16")
    streams = load_adapter(adapter)
    streams.backbone_sha256 = fingerprint(folder)
    save_adapter(folder / "adapters" / "p4", streams)
    monkeypatch.setattr("parscale_core.checkpoint.folder.default_folder", lambda: folder)
    for options in ([], ["--streams", 1]):
        named = parscale("generate", "--model", folder, *RUN, *options)
        assert text(parscale("generate", *RUN, *options)) == text(named)
    assert text(parscale("generate", *RUN)) != text(named)
