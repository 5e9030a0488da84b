"""``parscale train`` and ``parscale plot`` as a user runs them; killed, and in two processes."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers.tiny_models import error_line
from safetensors.numpy import load_file

TEXT = "".join(f"Line {n}: streams differ by what they have read before.\n" for n in range(60))
SETTINGS = (
    *("--stage", "streams", "--streams", 2, "--prefix-length", 6, "--seq-length", 32),
    *("--batch-size", 4, "--steps", 12, "--lr", 0.01, "--report-every", 1),
    *("--eval-every", 4, "--save-every", 5),
)
TIMES = ("tokens_per_second", "iterations_per_second", "val_time", "peak_memory")


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("data") / "text.txt"
    file.write_text(TEXT)
    return file


def records(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def curve(run: Path) -> list[dict]:
    return [{k: v for k, v in r.items() if k not in TIMES} for r in records(run)]


@pytest.fixture(scope="module")
def whole(plain_model, text, tmp_path_factory) -> Path:
    """A run that was never interrupted, in this process."""
    from click.testing import CliRunner
    from parscale_cli.main import cli

    run = tmp_path_factory.mktemp("runs") / "whole"
    arguments = ["train", *SETTINGS, "--model", plain_model, "--data", text, "-o", run]
    result = CliRunner().invoke(cli, [str(a) for a in arguments])
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[0] == f"Wrote {run / 'adapter'}"
    assert lines[1] == "12 steps, 1,536 tokens"
    assert lines[2].startswith("held-out loss ")
    assert "tokens/s, peak memory" in result.stderr and "left" in result.stderr
    return run


def start(*arguments) -> subprocess.Popen:
    code = "from parscale_cli.main import cli; cli()"
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def test_killed_and_resumed(parscale, plain_model, text, whole, tmp_path):
    run = tmp_path / "run"
    process = start("train", *SETTINGS, "--model", plain_model, "--data", text, "-o", run)
    metrics = run / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.is_file() and len(metrics.read_text().splitlines()) > 8):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    if not (run / "adapter").exists():
        result = parscale("train", "--resume", run, "--quiet")
        assert result.exit_code == 0 and result.stderr == ""
    assert curve(run) == curve(whole)
    one, two = (load_file(folder / "adapter" / "adapters.safetensors") for folder in (run, whole))
    assert all((one[name] == value).all() for name, value in two.items())


def free_port() -> int:
    """The first of two ports, for two processes, that are free now."""
    for port in range(40000, 60000, 2):
        with contextlib.suppress(OSError), socket.socket() as one, socket.socket() as two:
            one.bind(("127.0.0.1", port))
            two.bind(("127.0.0.1", port + 1))
            return port
    raise OSError("no free ports")


def test_two_processes_learn_as_one(plain_model, text, whole, tmp_path):
    script = tmp_path / "parscale.py"
    script.write_text("from parscale_cli.main import cli\ncli()\n")
    run = tmp_path / "run"
    launch = Path(sys.executable).with_name("mlx.launch")
    arguments = ["train", *SETTINGS, "--model", plain_model, "--data", text, "-o", run, "--json"]
    result = subprocess.run(
        [launch, "-n", "2", "-p", str(free_port()), "--env", "OPENBLAS_NUM_THREADS=1", "--",
         sys.executable, script, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=200,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    printed = [line for line in result.stdout.splitlines() if line.startswith("{")]
    assert len(printed) == 1, result.stderr
    assert json.loads(printed[0])["trained_tokens"] == 1536
    for one, two in zip(curve(run), curve(whole), strict=True):
        assert one == pytest.approx(two, rel=1e-4)


def test_json(parscale, plain_model, text, tmp_path):
    result = parscale("train", "--stage", "pretrain", "--model", plain_model, "--data", text,
                      "--seq-length", 16, "--steps", 2, "-o", tmp_path / "run", "--json",
                      "--quiet")  # fmt: skip
    values = json.loads(result.stdout)
    assert values["steps"] == 2 and values["output"] == str(tmp_path / "run" / "model")
    assert values["valid_loss"] < values["valid_loss_before"]
    assert result.stderr == ""


def test_what_was_trained_generates(parscale, plain_model, whole):
    run = ("generate", "--model", plain_model, "--prompt", "Line", "-n", 5, "--quiet")
    result = parscale(*run, "--adapter", whole / "adapter")
    assert result.exit_code == 0 and result.stdout != parscale(*run).stdout


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ([], "--stage"),
        (["--stage", "streams"], "--output"),
        (["--stage", "sleep"], "--stage"),
        (["--stage", "streams", "-o", "x"], "--model"),
        (["--stage", "streams", "-o", "x", "--model", "m", "--streams", "2"], "--data"),
        (["--stage", "streams", "-o", "x", "--model", "m", "--data", "d"], "--streams or"),
        (["--stage", "pretrain", "-o", "x", "--model", "m", "--data", "d", "--streams", "2"],
         "--streams needs --stage streams"),
        (["--stage", "pretrain", "-o", "x", "--config", "/nowhere"], "--config"),
        (["--resume", "/nowhere"], "--resume"),
        (["--stage", "streams", "--lr", "0"], "--lr"),
        (["--stage", "streams", "--streams", "0"], "--streams"),
        (["--stage", "streams", "--batch-size", "0"], "--batch-size"),
    ],
)  # fmt: skip
def test_wrong_usage(parscale, options, named):
    result = parscale("train", *options)
    assert result.exit_code == 2
    assert named in error_line(result)


def test_a_run_keeps_its_settings(parscale, whole):
    result = parscale("train", "--resume", whole, "--steps", 20)
    assert result.exit_code == 2 and "--steps cannot go with --resume" in error_line(result)
    result = parscale("train", "--resume", whole)
    assert result.exit_code == 1 and "this run is finished" in error_line(result)


def test_failures_are_one_line(parscale, plain_model, text, whole, tmp_path):
    run = ("train", *SETTINGS, "--model", plain_model)
    result = parscale(*run, "--data", text, "-o", whole)
    assert result.exit_code == 1 and "exists already" in error_line(result)
    result = parscale(*run, "--data", text, "-o", tmp_path / "r", "--seq-length", 9999)
    assert result.exit_code == 1 and "--seq-length 9999" in error_line(result)
    (tmp_path / "empty.txt").write_text("")
    result = parscale(*run, "--data", tmp_path / "empty.txt", "-o", tmp_path / "r")
    assert result.exit_code == 1 and "no text in it" in error_line(result)
    assert not (tmp_path / "r").exists()


def test_plot(parscale, whole, tmp_path):
    pytest.importorskip("matplotlib")
    result = parscale("plot", whole, "-o", tmp_path / "loss.svg")
    assert (result.exit_code, result.stdout) == (0, f"Wrote {tmp_path / 'loss.svg'}\n")
    result = parscale("plot", whole, "-o", tmp_path / "loss.txt")
    assert result.exit_code == 2 and ".png, .svg, .pdf" in error_line(result)
    assert "exists already" in error_line(parscale("plot", whole, "-o", tmp_path / "loss.svg"))
