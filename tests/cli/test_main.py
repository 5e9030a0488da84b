"""The command as a whole: what it imports, how it fails, and the smaller subcommands."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from helpers.tiny_models import error_line


def test_help_imports_no_engine():
    code = (
        "import sys; from parscale_cli.main import cli; cli(['--help'], standalone_mode=False);"
        "heavy = {'mlx', 'numpy', 'onnx', 'onnxruntime', 'torch', 'transformers', 'parscale_mlx',"
        " 'parscale_export', 'huggingface_hub'} & set(sys.modules); assert not heavy, heavy"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    for command in ("generate", "chat", "convert", "doctor", "export-onnx", "verify"):
        assert command in result.stdout


@pytest.mark.parametrize("package", ["parscale_mlx", "parscale_export"])
def test_the_packages_keep_to_their_engines(package):
    foreign = {"parscale_mlx": "onnx", "parscale_export": "mlx"}[package]
    code = (
        f"import pkgutil, importlib, sys, {package} as p\n"
        "for m in pkgutil.walk_packages(p.__path__, p.__name__ + '.'):\n"
        "    try:\n"
        "        importlib.import_module(m.name)\n"
        "    except ModuleNotFoundError as error:\n"
        "        assert error.name in ('lm_eval', 'torch', 'scipy', 'matplotlib'), error\n"
        f"assert {foreign!r} not in sys.modules"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_an_unexpected_failure_is_one_line(parscale, monkeypatch):
    def fail(*args, **options):
        raise RuntimeError("something\nbroke")

    monkeypatch.setattr("parscale_mlx.engine.opening.open_models", fail)
    assert (
        error_line(parscale("generate", "--model", "python-small", "-p", "a"))
        == "Error: something broke"
    )


def test_doctor(parscale):
    report = json.loads(parscale("doctor", "--json").stdout)
    assert report["versions"]["mlx"]
    assert report["gflops"] > 0
    assert report["memory"]["total"] > report["memory"]["available"] > 0
    if sys.platform == "linux" and report["mlx_on_cpu"]:
        assert "blas" in report["blas"] or "mkl" in report["blas"] or "blis" in report["blas"]
    text = parscale("doctor").stdout
    assert "GFLOP/s" in text and report["versions"]["mlx-lm"] in text


@pytest.mark.skipif(sys.platform != "linux", reason="the BLAS is replaced on Linux only")
def test_doctor_says_what_to_install_for_a_slow_blas():
    code = "from parscale_cli.main import cli; cli(['doctor', '--json'])"
    environment = os.environ | {"PARSCALE_BLAS": "off"}
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment
    )
    report = json.loads(result.stdout)
    if report["mlx_on_cpu"] and report["gflops"] < 20:
        assert any("openblas" in line for line in report["advice"])


@pytest.mark.skipif(sys.platform != "linux", reason="the BLAS is replaced on Linux only")
def test_a_blas_that_does_not_exist_is_named():
    code = "from parscale_cli.main import cli; cli(['doctor'])"
    environment = os.environ | {"PARSCALE_BLAS": "/nowhere/libfast.so"}
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment
    )
    assert result.returncode == 1
    assert result.stderr.startswith("Error: PARSCALE_BLAS=/nowhere/libfast.so")
    assert "Traceback" not in result.stderr


def test_chat_remembers_resets_and_answers_commands(parscale, model):
    lines = "hello\n/streams\nhello\n/reset\n/streams\nhello\n/help\n/what\n/quit\n"
    result = parscale("chat", "--model", model, "-n", 6, input=lines)
    assert result.exit_code == 0, result.output
    first, second, third = result.stdout.split("\n")[:3]
    assert first == third != second
    for part in ("conversation forgotten", "streams shown", "streams: 1 2 3 4", "streams hidden",
                 "/reset", "/what: not a command"):  # fmt: skip
        assert part in result.stderr


def test_chat_is_what_generate_says_of_the_whole_conversation(parscale, model, tmp_path):
    chat = parscale("chat", "--model", model, "-n", 5, "--system", "S", input="ab\ncd\n")
    # The tiny model's bytes rarely are text: only compare where they survive a round trip.
    answer = json.loads(parscale("generate", "--model", model, "-n", 5, "--system", "S",
                                 "-p", "ab", "--json").stdout)  # fmt: skip
    assert chat.stdout.startswith(answer["text"] + "\n")


def test_chat_needs_a_template(parscale, plain_model):
    assert "chat template" in error_line(parscale("chat", "--model", plain_model, input="a\n"))


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_ctrl_c_stops_one_answer_only(model):
    code = "from parscale_cli.main import cli; cli()"
    process = subprocess.Popen(
        [sys.executable, "-c", code, "chat", "--model", str(model), "-n", "1000000"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdin and process.stdout
    process.stdin.write(b"hello\n")
    process.stdin.flush()
    process.stdout.read(20)
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    process.stdin.write(b"/reset\n")
    process.stdin.close()
    process.stdout.read()
    assert b"conversation forgotten" in process.stderr.read()
    assert process.wait(60) == 0
