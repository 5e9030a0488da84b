"""``parscale serve`` as a process: what it prints, how it stops, what it refuses."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.client import HTTPConnection, IncompleteRead

from parscale_mlx import load

import mlx.core as mx
import pytest
from helpers.onnx_cases import random_model
from helpers.serving import CHAT, TEXT, chat
from helpers.tiny_models import error_line, write_tokenizer
from mlx_lm.generate import generate_step

RUN = [sys.executable, "-c", "from parscale_cli.main import cli; cli()", "serve"]


@contextmanager
def process(*arguments, warned=False, **environment):
    """The command, once it serves: the process, and the line that says where.

    Args:
        warned: it says before that anybody may ask.
    """
    command = [*RUN, *map(str, arguments), "--port", "0"]
    with subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, env=os.environ | environment
    ) as run:
        try:
            if warned:
                assert "no API key" in run.stderr.readline()
            line = run.stderr.readline()
            assert line.startswith("Serving "), line + run.stderr.read()
            yield run, line
        finally:
            run.kill()


def connect(line: str) -> HTTPConnection:
    return HTTPConnection("127.0.0.1", int(re.search(r":(\d+)$", line.strip())[1]), timeout=60)


def start_stream(connection: HTTPConnection, headers=None):
    """Ask for a long answer and read the beginning of it."""
    fields = {"stream": True, "stream_options": {"include_usage": True}}
    body = chat("Hi", max_tokens=400, logit_bias={"319": -100}, **fields)
    connection.request("POST", CHAT, json.dumps(body), headers or {})
    response = connection.getresponse()
    assert response.status == 200
    while not response.readline().startswith(b"data: "):
        pass
    return response


def test_quantised_caches(tmp_path):
    """Requests side by side, each answered as mlx-lm does with such a cache."""
    folder = random_model(tmp_path / "wide", hidden_size=256)  # heads of 64: groups divide them
    write_tokenizer(folder)
    loaded, tokenizer = load(folder)
    quantised = {"kv_bits": 4, "kv_group_size": 32, "quantized_kv_start": 9}
    options = [f"--{name.replace('_', '-')}={value}" for name, value in quantised.items()]
    prompts = [f"{'a longer ' * n}prompt {n}" for n in range(5)]

    def ask(text: str) -> dict:
        connection = connect(line)
        connection.request("POST", TEXT, json.dumps({"prompt": text, "max_tokens": 20}))
        return json.loads(connection.getresponse().read())

    with process("--model", folder, *options) as (_, line), ThreadPoolExecutor(5) as pool:
        answers = list(pool.map(ask, prompts))
    plain = []
    for text, answer in zip(prompts, answers, strict=True):
        ids = mx.array(tokenizer.encode(text))
        steps, plain_steps = (
            generate_step(ids, loaded, max_tokens=20, **options) for options in (quantised, {})
        )
        expected = tokenizer.decode([token for token, _ in steps])
        assert answer["choices"][0]["text"] == expected
        plain.append(tokenizer.decode([token for token, _ in plain_steps]) == expected)
    assert not all(plain)  # that the caches are quantised shows


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_curl(backbone, adapter):
    def curl(body: dict) -> str:
        url = f"http://127.0.0.1:{port}{CHAT}"
        command = ["curl", "--silent", "--show-error", "--fail", "--no-buffer", url]
        command += ["--header", "Content-Type: application/json", "--data", json.dumps(body)]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    with process("--model", backbone, "--adapter", adapter, "--name", "mine") as (_, line):
        port = line.strip().rpartition(":")[2]
        whole = json.loads(curl(chat("Hi", max_tokens=5, model="mine:p4")))
        events = curl(chat("Hi", max_tokens=5, model="mine:p4", stream=True)).split("\n\n")
    assert whole["model"] == "mine:p4"
    pieces = [json.loads(e.removeprefix("data: ")) for e in events if e.startswith("data: {")]
    text = "".join(p["choices"][0]["delta"].get("content") or "" for p in pieces if p["choices"])
    assert text == whole["choices"][0]["message"]["content"] != ""
    assert "data: [DONE]" in events


@pytest.mark.slow
@pytest.mark.parametrize("draft", ["mine:p1", "a folder"])
def test_a_draft(backbone, adapter, model, draft):
    arguments = ("--model", backbone, "--adapter", adapter, "--name", "mine", "--draft-model")
    texts = []
    with process(*arguments, model if draft == "a folder" else draft) as (_, line):
        for drafted in (0, 2):
            connection = connect(line)
            connection.request("POST", CHAT, json.dumps(chat("Hi", num_draft_tokens=drafted)))
            texts.append(json.load(connection.getresponse())["choices"][0]["message"]["content"])
    assert texts[0] == texts[1] != ""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_running_answers_finish(backbone, adapter, number):
    arguments = ("--model", backbone, "--adapter", adapter, "--name", "mine", "--streams", 1)
    key = {"Authorization": "Bearer k"}
    with process(*arguments, PARSCALE_API_KEY="k") as (run, line):
        assert line.startswith("Serving mine, mine:p1, mine:p4 on http://127.0.0.1:")
        response = start_stream(connect(line), key)
        run.send_signal(number)
        while True:
            late = connect(line)
            try:
                late.request("POST", CHAT, json.dumps(chat("Hi")), key)
            except ConnectionRefusedError:
                break
            if late.getresponse().status == 503:
                break
        lines = response.read().decode().split("\n\n")
        assert lines[-2] == "data: [DONE]"
        last = json.loads(lines[-3].removeprefix("data: "))
        assert last["usage"]["completion_tokens"] == 400 and last["model"] == "mine:p1"
        assert run.wait(20) == 0
        log = run.stderr.read()
    assert "Traceback" not in log
    assert re.search(r"INFO 127.0.0.1 POST /v1/chat/completions 200 \d", log)


def test_a_second_signal_ends_them(model):
    with process("--model", model, "--log-level", "warning") as (run, line):
        response = start_stream(connect(line))
        run.send_signal(signal.SIGTERM)
        run.send_signal(signal.SIGINT)
        assert run.wait(20) == 0
        # What is cut off does not look complete.
        with pytest.raises(IncompleteRead) as cut:
            response.read()
        assert b"[DONE]" not in cut.value.partial
        assert run.stderr.read() == ""


def test_a_port_that_is_taken(parscale, model):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        result = parscale("serve", "--model", model, "--port", port)
    assert result.exit_code == 1 and "in use" in error_line(result)


@pytest.mark.parametrize(
    ("arguments", "code", "word"),
    [
        (["--model", "/nowhere"], 1, "/nowhere"),
        (["--streams", "3"], 1, "3 streams"),
        (["--host", "no.such.host.invalid"], 1, "no.such.host.invalid"),
        (["--max-concurrent", "0"], 2, "--max-concurrent"),
        (["--timeout", "0"], 2, "--timeout"),
        (["--api-key", ""], 2, "--api-key"),
        (["--name", "a:p4"], 2, "--name"),
        (["--api-key", "schlüssel"], 2, "ASCII"),
        (["--temp", "nan"], 2, "--temp"),
        (["--timeout", "inf"], 2, "--timeout"),
        (["--draft", "ngram", "--draft-model", "x"], 2, "--draft-model"),
        (["--runtime", "onnx", "--kv-bits", "8"], 2, "--kv-bits"),
    ],
)
def test_bad_options(parscale, model, arguments, code, word):
    result = parscale("serve", "--model", model, *arguments)
    assert result.exit_code == code and word in error_line(result)


def test_an_export(parscale, model, tmp_path):
    export = tmp_path / "export"
    written = parscale("export-onnx", "--model", model, "-o", export, "--aggregation-weights")
    assert written.exit_code == 0
    answers = []
    for folder in (export, model):
        options = ("--model", folder, "--name", "mine", "--host", "0.0.0.0")
        with process(*options, warned=True) as (_, line):
            connection = connect(line)
            body = chat("Hi", stream_weights=True, logprobs=True)
            connection.request("POST", CHAT, json.dumps(body))
            answers.append(json.load(connection.getresponse())["choices"][0])
    texts = [answer["message"]["content"] for answer in answers]
    assert texts[0] == texts[1] != ""
    for ours, theirs in zip(*(answer["parscale_streams"] for answer in answers), strict=True):
        assert ours["weights"] == pytest.approx(theirs["weights"], abs=1e-4)
