"""``parscale export-onnx`` and ``parscale verify`` as a user runs them."""

import json

import numpy as np
import pytest
from click.testing import CliRunner
from helpers.onnx_cases import GOLDEN, variant
from safetensors.numpy import load_file

P4 = GOLDEN / "p4"


@pytest.fixture
def parscale():
    pytest.importorskip("parscale_mlx")
    from parscale_cli.main import cli

    return lambda *arguments: CliRunner().invoke(cli, [str(a) for a in arguments])


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8", "int4", "w8a8"])
def test_export_and_verify(parscale, tmp_path, precision):
    output = tmp_path / "out"
    exported = parscale("export-onnx", "--model", P4, "-o", output, "--precision", precision)
    assert exported.exit_code == 0, exported.output
    assert exported.stdout.startswith(f"{output}: P=4, batch layout, fused operators, {precision}")
    verified = parscale("verify", output, "--against", P4, "--tokens", 6, "--json")
    assert verified.exit_code == 0, verified.output
    report = json.loads(verified.stdout)
    assert report["within_tolerance"] and report["precision"] == precision
    if precision == "fp32":
        assert report["max_difference"] < 1e-4 and report["greedy_parts_at"] is None
    strict = parscale("verify", output, "--against", P4, "--tokens", 6, "--max-kl", 0,
                      "--max-difference", 0)  # fmt: skip
    assert strict.exit_code == 1
    assert "beyond the tolerance" in strict.stdout


def test_verify_finds_other_weights(parscale, tmp_path):
    tensors = load_file(P4 / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"] * np.float32(1.1)
    other = variant(tmp_path / "other", tensors=tensors)
    parscale("export-onnx", "--model", other, "-o", tmp_path / "out")
    result = parscale("verify", tmp_path / "out", "--against", P4, "--tokens", 4)
    assert result.exit_code == 1
    assert "largest logit difference" in result.stdout


def test_json_and_options(parscale, tmp_path):
    result = parscale(
        "export-onnx", "--model", P4, "-o", tmp_path / "out", "--target", "web", "--json",
        "--precision", "fp32", "--all-logits", "--aggregation-weights",
    )  # fmt: skip
    report = json.loads(result.stdout)
    assert report["files"] == ["config.json", "onnx/model.onnx", "onnx/model.onnx_data"]
    assert (report["streams"], report["kv_layout"]) == ("4", "heads")


def test_errors_are_one_line(parscale, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("keep")
    wrong = [
        (1, "exists already (--force", ["export-onnx", "--model", P4, "-o", tmp_path / "out"]),
        (1, "no config.json", ["export-onnx", "--model", tmp_path, "-o", tmp_path / "new"]),
        (1, "model.onnx", ["verify", P4, "--against", P4]),
        (2, "--precision", ["export-onnx", "--model", P4, "-o", "x", "--precision", "int3"]),
        (2, "--output", ["export-onnx", "--model", P4]),
    ]
    for code, message, arguments in wrong:
        result = parscale(*arguments)
        assert result.exit_code == code
        lines = [line for line in result.stderr.splitlines() if line.startswith("Error:")]
        assert len(lines) == 1 and message in lines[0], result.stderr
    parscale("export-onnx", "--model", GOLDEN / "p1", "-o", tmp_path / "one")
    result = parscale("verify", tmp_path / "one", "--against", P4)
    assert result.exit_code == 1
    assert "P=1" in result.stderr and "P=4" in result.stderr
