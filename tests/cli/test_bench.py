"""parscale bench on tiny models: what it prints, draws and refuses."""

import json
import shutil

import parscale_mlx
from parscale_mlx import machine
from parscale_mlx.adapter import save_adapter, take_streams

import pytest
from helpers.tiny_models import GOLDEN, error_line
from parscale_core.checkpoint.adapter import fingerprint
from safetensors.numpy import load_file, save_file

RUN = ("bench", "--tokens", 2, "--repeats", 1, "--prompt", "5")


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(machine, "SECONDS", 0.02)


def rows(result) -> list[dict]:
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)["rows"]


def test_a_model_with_streams(parscale, tmp_path):
    plot = tmp_path / "bench.svg"
    found = rows(parscale(*RUN, "--model", GOLDEN / "p4", "--streams", "1,2,4", "--batch", "1,2",
                          "--quantize", "none", "--quantize", 4, "--group-size", 32, "--json",
                          "--plot", plot))  # fmt: skip
    assert [(r["weights"], r["batch"], r["side"]) for r in found] == [
        (weights, batch, side)
        for weights in ("float32", "4 bit")
        for batch in (1, 2)
        for side in ("mlx-lm", "P=1", "P=2", "P=4")
    ]
    for row in found:
        assert row["first_token"] > 0 and row["step"] > 0 and row["peak_memory"] > 0
        assert row["decode_rate"] == pytest.approx(row["batch"] / row["step"])
        assert row["bandwidth_share"] > 0 and row["compute_share"] > 0
    plain, one, _, four = found[:4]
    assert plain["step_times"] == 1 and plain["step_bytes"] == one["step_bytes"]
    assert 2 * one["step_flops"] < four["step_flops"]
    assert found[8]["step_bytes"] < plain["step_bytes"] / 2
    assert found[8]["peak_memory"] < plain["peak_memory"]
    assert plot.read_text().startswith("<?xml")


def test_a_shape(parscale):
    result = parscale(*RUN, "--shape", GOLDEN / "p1" / "config.json", "--streams", 2,
                      "--cpu-time")  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "in processor time" in result.stdout
    lines = result.stdout.splitlines()
    assert "config.json on Device(" in lines[0] and "GB/s" in lines[2]
    assert [line.split()[3] for line in lines[6:]] == ["mlx-lm", "P=2"]


def test_an_adapter(parscale, tmp_path):
    backbone = tmp_path / "backbone"
    shutil.copytree(GOLDEN / "p4", backbone)
    weights = load_file(backbone / "model.safetensors")
    for name in [k for k in weights if "prefix" in k or "aggregate" in k]:
        del weights[name]
    save_file(weights, backbone / "model.safetensors")
    config = json.loads((backbone / "config.json").read_text())
    (backbone / "config.json").write_text(json.dumps(config | {"parscale_n": 1}))
    model, _ = parscale_mlx.load_model(GOLDEN / "p4")
    adapter = tmp_path / "adapter"
    save_adapter(adapter, take_streams(model, backbone="b", backbone_sha256=fingerprint(backbone)))
    found = rows(
        parscale(*RUN, "--model", backbone, "--adapter", adapter, "--streams", 4, "--json")
    )
    assert [r["streams"] for r in found] == [1, 4]
    line = error_line(parscale(*RUN, "--model", GOLDEN / "p1", "--adapter", adapter))
    assert "another backbone" in line


def test_what_is_refused(parscale, tmp_path):
    shape = tmp_path / "config.json"
    shape.write_text('{"model_type": "gpt2"}')
    for options, code, message in (
        (("--model", "a", "--shape", shape), 2, "cannot go together"),
        (("--adapter", tmp_path), 2, "--adapter needs --model"),
        (("--shape", shape), 1, f"{shape}: model_type 'gpt2' is not one of"),
        (("--shape", tmp_path), 1, "model_type 'gpt2' is not one of"),
        (("--model", tmp_path / "none"), 1, "neither a folder here nor a model"),
        (("--streams", "0"), 2, "from 1 to 64"),
        (("--plot", tmp_path / "a.txt"), 2, ".png"),
    ):
        result = parscale(*RUN, *options)
        assert (result.exit_code, message in error_line(result)) == (code, True), result.output
    packed = tmp_path / "packed"
    assert (
        parscale("convert", GOLDEN / "p4", "-o", packed, "-q", "--q-group-size", 32).exit_code == 0
    )
    line = error_line(parscale(*RUN, "--model", packed, "--quantize", 4))
    assert "quantised already" in line
    assert (
        rows(parscale(*RUN, "--model", packed, "--streams", 4, "--json"))[0]["weights"] == "4 bit"
    )
