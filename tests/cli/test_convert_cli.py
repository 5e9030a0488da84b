"""``parscale convert``: what it prints, and how it fails."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner
from parscale_cli.convert import convert

GOLDEN = Path(__file__).parent.parent / "golden"


def run(*arguments):
    return CliRunner().invoke(convert, [str(a) for a in arguments])


def test_what_it_prints(tmp_path):
    result = run(GOLDEN / "p4", "--output", tmp_path / "out")
    assert result.exit_code == 0 and result.stderr == ""
    assert result.stdout.splitlines() == [
        f"Wrote {tmp_path / 'out'}",
        "0.2 million parameters, 4 streams with 48 prefix tokens",
        "float32: 0.9 MB, 32.00 bits a weight",
    ]
    assert (tmp_path / "out" / "config.json").is_file()


def test_json(tmp_path):
    out = tmp_path / "out"
    options = ["-q", "--q-bits", 8, "--q-group-size", 32, "--dtype", "bfloat16", "--json"]
    result = run(GOLDEN / "p4", "-o", out, *options)
    printed = json.loads(result.stdout)
    assert printed["quantization"] == {"bits": 8, "group_size": 32, "mode": "affine"}
    assert printed["dtype"] == "bfloat16" and printed["output"] == str(out)
    assert printed["streams"] == 4 and printed["dry_run"] is False
    assert json.loads((out / "config.json").read_text())["quantization"]["bits"] == 8


def test_dry_run(tmp_path):
    result = run(GOLDEN / "p4", "-o", tmp_path / "out", "--dry-run", "-q")
    assert result.stdout.startswith(f"Would write {tmp_path / 'out'}\n")
    assert "4 bits in groups of 64 (affine), the rest float32" in result.stdout
    assert list(tmp_path.iterdir()) == []


def test_grafting(plain_model, tmp_path):
    text = tmp_path / "text"
    text.write_text("Streams differ by what they have read. " * 30)
    result = run(
        *(plain_model, "-o", tmp_path / "out", "--streams", 2),
        *("--prefix-length", 8, "--text", text),
    )
    assert result.exit_code == 0, result.output
    assert "2 streams with 8 prefix tokens" in result.stdout
    assert "perplexity" in result.stdout and "before grafting" in result.stdout
    text.write_bytes(b"\xff\xfe\xfa")
    result = run(plain_model, "-o", tmp_path / "b", "--streams", 2, "--text", text)
    assert result.exit_code == 1 and "not UTF-8" in result.stderr


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["-q", "--q-bits", "7"], "'7' is not one of"),
        (["-q", "--q-mode", "gptq"], "'gptq' is not one of"),
        (["-q", "--q-mode", "mxfp4", "--q-bits", "8"], "--q-mode mxfp4: "),
        (["-q", "--q-group-size", "16"], "--q-mode affine: "),
        (["-q", "--q-recipe", "mixed_3_6", "--q-bits", "4"], "--q-recipe mixed_3_6: "),
        (["--dtype", "int8"], "'int8' is not one of"),
        (["--q-bits", "4"], "--q-bits needs --quantize"),
        (["--q-mode", "affine"], "--q-mode needs --quantize"),
        (["--quantize-all"], "--quantize-all needs --quantize"),
        (["--prefix-length", "8"], "--prefix-length needs --streams"),
        (["--text", __file__], "--text needs --streams"),
        (["--streams", "1"], "1 is not in the range 2<=x<=64"),
        (["--streams", "2", "--prefix-length", "0"], "0 is not in the range x>=1"),
        (["--streams", "2", "--text", "nowhere.txt"], "does not exist"),
    ],
)
def test_wrong_usage(options, words, tmp_path):
    result = run(GOLDEN / "p4", "-o", tmp_path / "out", *options)
    assert result.exit_code == 2 and result.stdout == ""
    assert words in " ".join(result.stderr.split())
    assert list(tmp_path.iterdir()) == []


def test_no_output():
    result = run(GOLDEN / "p4")
    assert result.exit_code == 2 and "Missing option '-o' / '--output'" in result.stderr


def test_failures_are_one_line(parscale, tmp_path):
    result = parscale("convert", GOLDEN, "-o", tmp_path / "out")
    assert result.exit_code == 1
    assert result.stderr == f"Error: {GOLDEN}: no config.json in this folder\n"
    parscale("convert", GOLDEN / "p4", "-o", tmp_path / "out")
    result = parscale("convert", GOLDEN / "p4", "-o", tmp_path / "out")
    assert result.exit_code == 1
    assert result.stderr == f"Error: {tmp_path / 'out'} exists already (--force replaces it)\n"
    result = parscale("convert", GOLDEN / "p4", "-o", tmp_path / "out", "--force")
    assert result.exit_code == 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--q-recipe", "mixed_3_6"), "3 and 6 bits in groups of 32 (affine)"),
        (("--q-recipe", "mixed_4_6", "--q-mode", "affine"), "4 and 6 bits in groups of 32"),
        (("--q-bits", 3), "3 bits in groups of 32 (affine)"),
    ],
    ids=str,
)
def test_recipes(parscale, model, tmp_path, options, words):
    run = ("convert", model, "--quantize", "--q-group-size", 32, "-o", tmp_path / "out")
    result = parscale(*run, *options)
    assert result.exit_code == 0, result.output
    assert words in result.stdout
