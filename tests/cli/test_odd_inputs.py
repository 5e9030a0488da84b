"""What a person may type that makes no sense: one line that names the option, before any work."""

import errno
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers.tiny_models import GOLDEN, error_line
from parscale_core.checkpoint.output import check_file, check_output, working_folder

P4 = GOLDEN / "p4"
REFUSED = """
generate --model "" -p a                                    | --model': it is empty
generate --model M -p a --adapter ""                        | --adapter': it is empty
generate --model M -p ""                                    | a prompt is empty
generate --model M -p a --stop ""                           | --stop': it is empty
generate --model M -p a --temp nan                          | nan is not a finite number
generate --model M -p a --temp inf                          | inf is not a finite number
generate --model M -p a --temp 1e-300                       | beyond the numbers that float32 holds
generate --model M -p a --presence-penalty 1e39             | beyond the numbers that float32 holds
generate --model M -p a -n 99999999999999999999             | is more than 2147483647
generate --model M -p a --top-p 0.5                         | --top-p needs --temp above 0
generate --model M -p a --repetition-context 9              | needs one of the penalties
generate --model M -p a --num-draft-tokens 4                | needs --draft or --draft-model
generate --model M -p a --watch-timeout 5                   | --watch-timeout needs --parallel
convert M -o ""                                             | --output': it is empty
convert M -o OUT --prefix-length 4                          | --prefix-length needs --streams
cost --paper 1.6B                                           | MODEL cannot go with --paper
cost --paper --streams 2                                    | --streams cannot go with --paper
cost --k nan                                                | nan is not a finite number
cost --force                                                | --force needs --plot
cost --parts --json                                         | --parts cannot go with --json
scaling-law --streams 4                                     | --streams needs --parameters
scaling-law --parameters 1e400                              | is not a number of parameters
scaling-law --confidence nan                                | nan is not a finite number
train --stage streams --streams 2 --model M --data F --pattern x -o OUT | --pattern needs a folder
train --stage streams --streams 2 --model M --data F --lr nan -o OUT    | not a finite number
train --stage streams --streams 2 --model M --data F --project-name x -o OUT | needs --report-to
train --stage streams --adapter . --model M --data F --smoothing 0 -o OUT | needs --streams
train --stage pretrain --freeze-backbone --model M --data F -o OUT      | needs --stage streams
train --stage pretrain --streams 2 --model M --data F -o OUT | --streams needs --stage streams
export-onnx --model "" -o OUT                               | --model': it is empty
export-onnx --model M -o OUT --ops standard --accuracy-level 4 | --accuracy-level needs --ops fused
export-onnx --model M -o OUT --precision int8 --calibrate F | --calibrate needs --precision w8a8
export-onnx --model M -o OUT --calibrate F                  | --calibrate needs --precision w8a8
export-onnx --model M -o OUT --block-size 64                | needs a quantised --precision
perplexity F --model M --level nan                          | nan is not a finite number
evaluate --model M --tasks x --samples 2                    | --samples needs --code
evaluate --model M --code F --run-generated-code --force    | --force needs --output
evaluate --model M --code F --run-generated-code --num-fewshot 1 | --num-fewshot needs --tasks
verify OUT --against ""                                     | --against': it is empty
bench --model M --group-size 32                             | --group-size needs --quantize
serve --model M --timeout nan                               | nan is not a finite number
serve --model M --name ""                                   | --name': it is empty
serve --model M --prompt-cache-bytes 99999999999999999999   | is more than 9223372036854775807
adapter show ""                                             | it is empty
adapter extract M --backbone M -o OUT --tolerance nan       | nan is not a finite number
doctor --clear-cache --json                                 | --json cannot go with --clear-cache
"""


@pytest.mark.parametrize("line", REFUSED.strip().splitlines())
def test_wrong_usage(parscale, line, tmp_path):
    command, words = line.rsplit(" | ", 1)
    (file := tmp_path / "text.txt").write_text("some text")
    names = {"M": str(P4), "F": str(file), "OUT": str(tmp_path / "out"), ".": str(tmp_path)}
    result = parscale(*(names.get(word, word) for word in shlex.split(command)))
    assert result.exit_code == 2, result.output
    assert words.strip() in error_line(result)
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize(
    "command",
    ["convert M -o /proc/x", "export-onnx --model M -o /proc/x", "scaling-law --plot /proc/x.png",
     "generate --model M -p a --prompt-cache /proc/x.safetensors", "convert M -o /dev/null/x",
     "train --stage streams --streams 2 --seq-length 8 --model M --data F -o /proc/x"],
)  # fmt: skip
@pytest.mark.skipif(sys.platform != "linux", reason="/proc takes no files")
def test_outputs_that_cannot_be_written(parscale, command, tmp_path):
    (file := tmp_path / "text.txt").write_text("some text")
    names = {"M": str(P4), "F": str(file)}
    result = parscale(*(names.get(word, word) for word in command.split()))
    line = error_line(result)
    assert result.exit_code == 1 and "/x" in line and "work-" not in line


@pytest.mark.parametrize("template", ["--chat-template", "--no-chat-template"])
def test_bytes_that_are_no_text(parscale, model, template, tmp_path):
    (lines := tmp_path / "prompts.jsonl").write_text('"half of a character: \\ud83d"')
    for prompt in (["-p", "\udcff\udcfe"], ["--prompts-file", lines]):
        result = parscale("generate", "--model", model, template, *prompt)
        assert result.exit_code == 1 and "not text in UTF-8" in error_line(result)


def test_data_that_is_nowhere_fails_at_once(parscale, plain_model, tmp_path):
    start = time.monotonic()
    run = ["train", "--stage", "streams", "--streams", 2, "--seq-length", 8]
    result = parscale(*run, "--model", plain_model, "--data", "no.txt", "-o", tmp_path / "run")
    assert "no.txt: neither a file or folder here nor a data set" in error_line(result)
    assert not (tmp_path / "run").exists() and time.monotonic() - start < 10


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="/dev/full is Linux's")
@pytest.mark.parametrize("command", [["--help"], ["cost", "--paper"]], ids=" ".join)
def test_standard_output_on_a_full_disk(command):
    code = "from parscale_cli.main import cli; cli()"
    with Path("/dev/full").open("w") as full:
        result = subprocess.run(
            [sys.executable, "-c", code, *command], stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert result.returncode == 1
    assert result.stderr == "Error: no space left on device\n"


def test_a_full_disk_is_said_of_the_output(tmp_path, monkeypatch):
    full = SimpleNamespace(free=0)
    monkeypatch.setattr("parscale_core.checkpoint.output.shutil.disk_usage", lambda _: full)
    with pytest.raises(FileNotFoundError, match="no such model"), working_folder(tmp_path / "out"):
        raise FileNotFoundError("no such model")
    for error in (
        OSError(errno.ENOSPC, "full"),
        RuntimeError("No space left on device"),
        OSError("20480 requested and 10496 written"),  # numpy's
    ):
        with (
            pytest.raises(OSError, match="No space left") as raised,
            working_folder(tmp_path / "out"),
        ):
            raise error
        assert raised.value.filename == str(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_what_killed_runs_left_is_swept(tmp_path):
    code = (
        "import os, sys; from pathlib import Path\n"
        "from parscale_core.checkpoint.output import working_folder\n"
        "with working_folder(Path(sys.argv[1])) as work:\n"
        "    (work / 'half').write_text('x'); os._exit(1)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "out")], check=False)
    (left,) = tmp_path.iterdir()
    with working_folder(tmp_path / "out") as first:
        assert not left.exists()
        with working_folder(tmp_path / "out") as second:
            assert first.exists() and second.exists()
    assert list(tmp_path.iterdir()) == []


def test_files_and_folders_are_not_each_other(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(FileExistsError, match="is a folder"):
        check_file(tmp_path, force=True)
    with pytest.raises(NotADirectoryError, match="file is not a folder"):
        check_output(tmp_path / "file" / "out", force=True)


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
@pytest.mark.parametrize(
    ("deaf", "sleep", "code"),
    [
        (False, "time.sleep", 130),
        (True, "time.sleep", 130),
        (True, "ctypes.PyDLL(None).sleep", -9),  # holds the interpreter's lock
    ],
)
def test_ctrl_c_ends_a_command_within_two_seconds(deaf, sleep, code, tmp_path):
    script = (
        "import ctypes, time; from pathlib import Path\n"
        "from parscale_cli.options.command import command\n"
        "from parscale_core.checkpoint.output import working_folder\n"
        "@command()\n"
        "def convert():\n"
        f"    with working_folder(Path({str(tmp_path / 'out')!r})):\n"
        "        print('ready', flush=True)\n"
        "        while True:\n"
        "            try:\n"
        f"                {sleep}(60)\n"
        "            except KeyboardInterrupt:\n"
        f"                if not {deaf}: raise\n"
        "convert()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    start = time.monotonic()
    _, errors = process.communicate(timeout=30)
    assert time.monotonic() - start < 4
    assert process.returncode == code
    assert errors.strip() == "Interrupted: nothing was written"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX terminals")
def test_a_pasted_text_is_one_message(model):
    import os
    import pty

    main, terminal = pty.openpty()
    code = "from parscale_cli.main import cli; cli()"
    process = subprocess.Popen(
        [sys.executable, "-c", code, "chat", "--model", str(model), "-n", "4"],
        stdin=terminal,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
    )
    assert process.stderr is not None and "Type a message" in process.stderr.readline()
    os.write(main, b"first\nsecond\nthird\n")
    assert process.stdout is not None
    answer = process.stdout.readline()  # to what was pasted, which has all been read by then
    os.write(main, b"/quit\n")
    out, errors = process.stdout.read(), process.stderr.read()
    assert process.wait(60) == 0, errors
    assert (answer + out).count("> ") == 2  # one for the message, one for /quit


@pytest.mark.skipif(sys.platform != "linux", reason="the BLAS is replaced on Linux only")
def test_mlx_imported_first_gets_one_line():
    code = "import mlx.core, parscale_mlx; from parscale_mlx import blas; print(blas.LATE)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stderr in ("", result.stdout)  # nothing where there is no faster one


def test_damaged_data_is_found(parscale, plain_model, tmp_path):
    out = tmp_path / "out"
    assert parscale("export-onnx", "--model", plain_model, "-o", out).exit_code == 0
    run = ("generate", "--model", out, "-p", "a", "-n", 1)
    data = out / "model.onnx.data"
    raw = bytearray(data.read_bytes())
    raw[-1] ^= 1
    data.write_bytes(raw)
    for command in (run, ("verify", out, "--against", plain_model)):
        line = error_line(parscale(*command))
        assert f"{data}: not the data that model.onnx was written with" in line
        assert "--no-check" in line
    assert parscale(*run, "--no-check").exit_code == 0


def test_help_has_sections_and_whole_summaries(parscale):
    text = parscale("generate", "--help").stdout
    sections = ("Model:", "Prompts:", "Sampling:", "KV cache:", "Drafts:", "Output:", "ONNX:")
    places = [text.index(f"\n{section}") for section in sections]
    assert places == sorted(places)
    assert "[default: 256" in text and max(map(len, text.splitlines())) <= 100
    assert "..." not in parscale("--help").stdout.split("Commands:")[1]
