"""What ``parscale serve`` refuses and how, and what it tells of itself."""

import json
import socket
import time
from contextlib import suppress

from parscale_mlx.engine.batch import Batch

import pytest
from helpers.serving import (
    CHAT,
    TEXT,
    chat,
    metric,
    post,
    raw,
    raw_post,
    request,
    serving,
)


@pytest.fixture(scope="module")
def server(opened):
    with serving(opened, max_tokens=400) as server:
        yield server


@pytest.fixture(autouse=True)
def still_answers(request):
    """Whatever a test did to the shared server, it answers afterwards."""
    if "server" not in request.fixturenames:
        yield
    else:
        server, reference = map(request.getfixturevalue, ("server", "reference"))
        yield
        answer = post(server, CHAT, chat("still there?", max_tokens=4))
        assert answer.text() == reference.chat("still there?", 4)


IMAGE = {"type": "image_url", "image_url": {"url": "http://127.0.0.1:1/x.png"}}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {}}}
BAD_CHAT = [
    ({"messages": []}, "messages"),
    ({"messages": "Hi"}, "messages"),
    ({"messages": [{"content": "Hi"}]}, "role"),
    ({"messages": [{"role": "user", "content": 5}]}, "content"),
    ({"messages": [{"role": "user", "content": [IMAGE]}]}, "text"),
    ({"messages": [{"role": "user", "content": "\ud800"}]}, "tokens"),
    ({"messages": [{"role": "assistant", "content": "x", "tool_calls": [5]}]}, "tool_calls"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": 401}, "400"),
    ({"max_tokens": 10**400}, "max_tokens"),
    ({"max_completion_tokens": "5"}, "max_completion_tokens"),
    ({"max_completion_tokens": 0}, "max_completion_tokens must"),
    ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"x-guidance": {}}}}},
     "x-guidance"),
    ({"temperature": -1}, "temperature"),
    ({"temperature": 10**400}, "temperature"),
    ({"temperature": True}, "temperature"),
    ({"top_p": 1.5}, "top_p"),
    ({"top_k": 320}, "319"),
    ({"xtc_threshold": 0.9}, "0.5"),
    ({"repetition_context_size": 10**30}, "repetition_context_size"),
    ({"seed": -(2**63) - 1}, "seed"),
    ({"seed": 2**64}, "seed"),
    ({"stop": 5}, "stop"),
    ({"stop": [5]}, "stop"),
    ({"stop": ""}, "stop"),
    ({"stop": ["x"] * 17}, "16"),
    ({"logit_bias": {"320": 1}}, "320"),
    ({"logit_bias": {"-1": 1}}, "logit_bias"),
    ({"logit_bias": {"5": "x"}}, "logit_bias"),
    ({"logit_bias": []}, "logit_bias"),
    ({"logprobs": 2}, "logprobs"),
    ({"top_logprobs": 21}, "top_logprobs"),
    ({"stream": "yes"}, "stream"),
    ({"stream_options": []}, "stream_options"),
    ({"stream_weights": 1}, "stream_weights"),
    ({"model": 5}, "model"),
    ({"tools": "x"}, "tools"),
    ({"n": 0}, "n must be"),
    ({"n": 129}, "n must be"),
    ({"response_format": {"type": "xml"}}, "response_format"),
    ({"response_format": {"type": "json_schema"}}, "json_schema is required"),
    ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "x"}}}}, "x"),
    ({"response_format": {"type": "json_schema", "json_schema": {"schema": []}}}, "schema"),
    ({"top_p": 0}, "top_p must be greater than 0"),
    ({"store": True}, "store"),
    ({"functions": [{"name": "f"}]}, "functions is not a field"),
    ({"tools": [TOOL]}, "chat template has no place"),
    ({"tools": [{"type": "function"}]}, "tools.0.function is required"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"temprature": 1}, "temprature is not a field"),
    ({"adapters": "/etc"}, "adapters"),
    ({"draft_model": "/etc"}, "draft_model"),
    ({"chat_template_kwargs": {"chat_template": "{{ 1 }}"}}, "chat_template"),
    ({"chat_template_kwargs": {"tokenizer_kwargs": {}}}, "tokenizer_kwargs"),
    ({"role_mapping": {"user": 5}}, "role_mapping"),
]  # fmt: skip
BAD_TEXT = [
    ({"prompt": None}, "prompt"),
    ({"prompt": ""}, "empty"),
    ({"prompt": []}, "empty"),
    ({"prompt": ["a", ""]}, "empty"),
    ({"prompt": ["a", 5]}, "prompt"),
    ({"prompt": ["a"] * 129}, "128 answers"),
    ({"prompt": "x", "best_of": 2}, "best_of"),
    ({"prompt": "x", "logprobs": 21}, "20"),
    ({"prompt": [5, 320]}, "319"),
    ({"prompt": [5, -1]}, "319"),
    ({"prompt": {"a": 1}}, "prompt"),
    ({"prompt": "x" * 600}, "600 tokens"),
    ({"prompt": "x", "echo": True}, "echo"),
    ({"prompt": "x", "suffix": "y"}, "suffix"),
]


@pytest.mark.parametrize(("fields", "word"), BAD_CHAT, ids=lambda x: str(x)[:40])
def test_bad_fields_of_a_chat(server, reference, fields, word):
    answer = post(server, CHAT, chat("Hi") | fields)
    assert answer.status == 400 and word in answer.error()


def test_long_names_and_marks_of_a_byte_order(server, reference):
    answer = post(server, CHAT, chat("Hi", model="x" * 100_000))
    assert answer.status == 404 and len(answer.body) < 500
    answer = post(server, CHAT, b"\xef\xbb\xbf" + json.dumps(chat("Hi")).encode())
    assert answer.text() == reference.chat("Hi")


def test_an_error_of_ours_is_told_as_others(server, monkeypatch, caplog):
    monkeypatch.setattr(server.serving.names, "resolve", lambda name: {}[name])
    answer = post(server, CHAT, chat("Hi"))
    assert answer.status == 500 and answer.error() == "the server failed at this request"
    monkeypatch.undo()
    assert wait_for(lambda: sum(r.exc_info is not None for r in caplog.records) == 1)


@pytest.mark.parametrize(("fields", "word"), BAD_TEXT, ids=lambda x: str(x)[:40])
def test_bad_fields_of_a_completion(server, reference, fields, word):
    answer = post(server, TEXT, fields)
    assert answer.status == 400 and word in answer.error()
    seeded = post(server, TEXT, fields | {"seed": 1})
    assert seeded.status == 400 and word in seeded.error()


@pytest.mark.parametrize(
    "body",
    [
        b"{",
        b"[]",
        b"5",
        b"\xff\xfe",
        b'{"messages": [{"role": "user", "content": "x"}], "temperature": NaN}',
        b'{"messages": [{"role": "user", "content": "x"}], "temperature": 1e999}',
        b"[" * 100_000,
        b'{"a":' * 50_000,
        b'{"seed": ' + b"9" * 10_000 + b"}",
    ],
)
def test_bodies_that_are_no_json_object(server, reference, body):
    answer = post(server, CHAT, body)
    assert answer.status == 400 and "JSON" in answer.error()


def test_unknown_models_and_paths(server, reference):
    for name in ("gpt-4", "tiny:p3", "tiny:p", "/etc/passwd", "../tiny", ""):
        answer = post(server, CHAT, chat("Hi", model=name))
        assert answer.status == 404 and "tiny:p4" in answer.error()
        assert answer.json()["error"]["code"] == "model_not_found"
    assert request(server, "GET", "/v1/models/gpt-4").status == 404
    for method, path, status in [
        ("GET", "/nothing", 404),
        ("GET", "/../../etc/passwd", 404),
        ("POST", "/v1/embeddings", 404),
        ("GET", CHAT, 405),
        ("PUT", CHAT, 405),
        ("DELETE", "/v1/models/tiny", 405),
    ]:
        answer = request(server, method, path)
        assert answer.status == status and answer.error()


def test_prompts_longer_than_the_context(server, reference):
    answer = post(server, CHAT, chat("x" * 600))
    assert answer.status == 400
    assert answer.json()["error"]["code"] == "context_length_exceeded"
    # An answer ends where the context does.
    prompt = "x" * 500
    answer = post(server, TEXT, {"prompt": prompt, "max_tokens": 100}).json()
    assert answer["usage"]["total_tokens"] == 512
    assert answer["choices"][0]["finish_reason"] == "length"


def first_line(connection: socket.socket) -> bytes:
    with connection, connection.makefile("rb") as answer:
        return answer.readline()


def test_requests_that_are_no_http(server, reference):
    assert b"400" in first_line(raw(server, b"hello there\r\n\r\n"))
    assert b"400" in first_line(raw(server, b"GET / HTTP/x\r\n\r\n"))
    assert b"431" in first_line(
        raw(server, b"GET / HTTP/1.1\r\nHost: localhost\r\n" + b"A: b\r\n" * 200 + b"\r\n")
    )
    assert b"414" in first_line(
        raw(server, b"GET /" + b"a" * 70_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n")
    )
    head = b"POST %s HTTP/1.1\r\nHost: localhost\r\n" % CHAT.encode()
    assert b"411" in first_line(raw(server, head + b"\r\n"))
    assert b"400" in first_line(raw(server, head + b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n"))
    assert b"400" in first_line(raw(server, head + b"Content-Length: x\r\n\r\n"))
    assert b"400" in first_line(raw(server, head + b"Content-Length: -5\r\n\r\n"))
    assert b"413" in first_line(raw(server, head + b"Content-Length: %d\r\n\r\n" % 10**18))
    short = raw(server, head + b"Content-Length: 50\r\n\r\n{}")
    short.shutdown(socket.SHUT_WR)
    assert b"400" in first_line(short)


def test_requests_that_are_too_large(opened):
    with serving(opened, max_request_bytes=1000) as server:
        answer = post(server, CHAT, chat("x" * 1_000_000))
        assert answer.status == 413 and "1000 bytes" in answer.error()
        assert post(server, CHAT, chat("x")).status == 200


def test_clients_that_do_not_send_their_request(opened):
    with serving(opened, read_timeout=0.4) as server:
        head = raw_post(CHAT, chat("Hi"))
        silent, half = raw(server, b""), raw(server, head[:-3])
        dripping = raw(server, b"")
        with suppress(OSError):
            for n in range(20):
                time.sleep(0.05)
                dripping.sendall(head[n : n + 1])
        assert n > 5
        for connection in (silent, half, dripping):
            with connection, suppress(OSError), connection.makefile("rb") as answer:
                assert answer.readline().split()[1:2] in (
                    [],
                    [b"408"],
                    [b"400"],
                )  # closed, or told why
        assert post(server, CHAT, chat("Hi")).status == 200
        assert wait_for(lambda: not server.server_state.connections)


def wait_for(condition, seconds: float = 10) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    return condition()


def test_no_more_than_max_concurrent(opened):
    with serving(opened, max_concurrent=2) as server:
        running = [
            raw(server, raw_post(CHAT, chat("x", max_tokens=480, stream=True))) for _ in "ab"
        ]
        for connection in running:
            connection.recv(1)
        answer = post(server, CHAT, chat("Hi"))
        assert answer.status == 429 and answer.headers["Retry-After"]
        assert answer.json()["error"]["type"] == "rate_limit_error"
        assert request(server, "GET", "/health").status == 200
        for connection in running:
            connection.close()
        assert wait_for(lambda: not server.serving.busy)
        assert post(server, CHAT, chat("Hi")).status == 200


def test_answers_that_take_too_long(opened):
    with serving(opened, timeout=0.3) as server:
        answer = post(server, CHAT, chat("x", max_tokens=480))
        assert answer.status == 504 and "longer" in answer.error()
        stream = post(server, CHAT, chat("x", max_tokens=480, stream=True))
        last = stream.body.decode().strip().rpartition("data: ")[2]
        assert stream.status == 200 and json.loads(last)["error"]["code"] == "timeout"
        # In line behind others is time too.
        assert wait_for(lambda: not server.serving.busy)
        assert post(server, CHAT, chat("x", max_tokens=2)).status == 200


def test_the_api_key(opened):
    with serving(opened, api_key="s3cret") as server:
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "s3"}):
            for method, path in (("POST", CHAT), ("GET", "/v1/models"), ("GET", "/metrics")):
                answer = request(server, method, path, chat("Hi"), headers)
                assert answer.status == 401
                assert answer.json()["error"]["code"] == "invalid_api_key"
        key = {"Authorization": "Bearer s3cret"}
        assert post(server, CHAT, chat("Hi"), key).status == 200
        assert request(server, "GET", "/v1/models", headers=key).status == 200
        for path in ("/health", "/"):
            assert request(server, "GET", path).status == 200


def test_pages_of_other_origins(opened, server):
    evil = {"Origin": "https://evil.example"}
    for method, path in (("POST", CHAT), ("GET", "/v1/models"), ("OPTIONS", CHAT)):
        answer = request(server, method, path, chat("Hi"), evil)
        assert answer.status == 403
        assert not any(name.lower().startswith("access-control") for name in answer.headers)
    assert post(server, CHAT, chat("Hi"), {"Origin": server.url}).status == 200
    assert post(server, CHAT, chat("Hi"), {"Host": "evil.example"}).status == 403
    with serving(opened, allowed_origins=("https://good.example",)) as other:
        good = {"Origin": "https://good.example"}
        answer = request(other, "OPTIONS", CHAT, headers=good)
        assert answer.status == 204
        assert answer.headers["Access-Control-Allow-Origin"] == "https://good.example"
        assert "Authorization" in answer.headers["Access-Control-Allow-Headers"]
        assert post(other, CHAT, chat("Hi"), good).status == 200
        assert post(other, CHAT, chat("Hi"), evil).status == 403


def test_health_and_metrics(opened):
    with serving(opened) as server:
        assert request(server, "GET", "/health").json() == {"status": "ok"}
        for _ in range(2):
            post(server, CHAT, chat("Hi", max_tokens=5))
        post(server, CHAT, b"{")
        # What is counted at a request's end comes after its answer.
        assert wait_for(lambda: not server.server_state.connections)
        text = request(server, "GET", "/metrics")
        assert text.status == 200 and text.headers["Content-Type"].startswith("text/plain")
        for line in (
            'parscale_requests_total{path="/v1/chat/completions",status="200"} 2.0',
            'parscale_requests_total{path="/v1/chat/completions",status="400"} 1.0',
            'parscale_generated_tokens_total{model="tiny:p4"} 10.0',
            'parscale_time_to_first_token_seconds_count{model="tiny:p4"} 2.0',
            'parscale_answer_tokens_per_second_count{model="tiny:p4"} 2.0',
            "parscale_requests_waiting 0.0",
            "parscale_requests_running 0.0",
        ):
            assert line in text.body.decode().splitlines()
        prompt = metric(server, "parscale_prompt_tokens_total", model="tiny:p4")
        cached = metric(server, "parscale_cached_prompt_tokens_total", model="tiny:p4")
        assert cached == prompt / 2 - 1
        assert metric(server, "parscale_prompt_cache_bytes") > 0
        assert metric(server, "parscale_memory_bytes") > 0


def test_when_generation_fails_the_server_says_so_and_ends(opened, monkeypatch, caplog):
    with serving(opened) as server:
        monkeypatch.setattr(Batch, "step", lambda self: 1 / 0)
        answer = post(server, CHAT, chat("Hi"))
        assert answer.status == 503 and "generation has failed" in answer.error()
        assert wait_for(lambda: server.serving.stopping)


def test_a_cache_of_prompts_can_be_left_out(opened, reference):
    with serving(opened, engine={"prompt_cache_size": 0}) as server:
        for _ in range(2):
            answer = post(server, CHAT, chat("Hi"))
            assert answer.text() == reference.chat("Hi")
            assert answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
        assert metric(server, "parscale_prompt_cache_sequences") == 0
