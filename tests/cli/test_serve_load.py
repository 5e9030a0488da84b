"""``parscale serve`` under a bounded burst of good and bad clients."""

import gc
import os
import random
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import mlx.core as mx
from helpers.serving import (
    CHAT,
    TEXT,
    Reference,
    chat,
    metric,
    post,
    raw,
    raw_post,
    request,
    serving,
)
from parscale_core.serve import connection

QUESTIONS = [f"question {word} of many" for word in ("one", "two", "three", "four", "five", "six")]
LENGTH = 24


def good(server, n: int, expected: dict) -> str:
    question, streams = QUESTIONS[n % 6], (4, 4, 2, 1)[n % 4]
    body = chat(question, model=f"tiny:p{streams}", max_tokens=LENGTH, stream=n % 3 == 0)
    while (answer := post(server, CHAT, body)).status in (429, 503):
        assert answer.headers["Retry-After"]
        time.sleep(0.05)
    assert answer.status == 200
    if n % 3:
        text = answer.text()
    else:
        text = "".join(c["choices"][0]["delta"].get("content", "") for c in answer.chunks())
    assert text == expected[question, streams], "another's text"
    return "answered"


def slow_reader(server, n: int, expected: dict) -> str:
    question = QUESTIONS[n % 6]
    body = raw_post(CHAT, chat(question, max_tokens=LENGTH, stream=True, model="tiny:p4"))
    # Else it is kept open for a next request, and the end is not to be seen.
    body = body.replace(b"Host:", b"Connection: close\r\nHost:", 1)
    received = b""
    with raw(server, body) as client:
        while part := client.recv(211):
            received += part
            time.sleep(0.005)
    status = received.split(b" ", 2)[1]
    if status in (b"429", b"503"):
        return "busy"
    assert status == b"200" and received.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")
    return "answered"


def hangs_up(server, n: int, expected: dict) -> str:
    body = raw_post(CHAT, chat("y" * 40, max_tokens=400, stream=n % 2 == 0, model="tiny:p4"))
    with raw(server, body) as client:
        client.settimeout(0.02 * (n % 5) + 0.001)
        with suppress(TimeoutError):
            client.recv(10)
        if n % 3 == 0:
            # Reset instead of an orderly end.
            linger = b"\1\0\0\0\0\0\0\0"
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    return "gone"


def bad(server, n: int, expected: dict) -> str:
    path, body, status = [
        (CHAT, b"{", 400),
        (CHAT, chat("x" * 2000), 400),
        (TEXT, {"prompt": ""}, 400),
        (CHAT, chat("Hi", model="gpt-4"), 404),
        (TEXT, b"z" * 70_000, 413),
        ("/v1/nothing", b"{}", 404),
    ][n % 6]
    answer = post(server, path, body)
    assert answer.status in (status, 429, 503)
    return "refused"


def test_a_burst_of_all_kinds_of_clients(opened, monkeypatch):
    monkeypatch.setattr(connection, "PROBE_SECONDS", 0.5)  # many hang up
    reference = Reference(*opened)
    expected = {
        (question, streams): reference.chat(question, LENGTH, streams)
        for question in QUESTIONS
        for streams in (1, 2, 4)
    }
    clients = [good] * 40 + [slow_reader] * 8 + [hangs_up] * 16 + [bad] * 18
    random.Random(5).shuffle(clients)
    settings = dict(max_concurrent=12, max_request_bytes=60_000, engine={"prompt_cache_size": 4})
    with serving(opened, **settings) as server:
        threads = threading.active_count()
        with ThreadPoolExecutor(24) as pool:
            runs = [pool.submit(kind, server, n, expected) for n, kind in enumerate(clients)]
            outcomes = [run.result(timeout=60) for run in runs]
        assert outcomes.count("answered") >= 40 and outcomes.count("refused") == 18
        settle(server, threads)
        before = held(server)
        # Quiet again, all of it is answered, and nothing of the burst is left behind.
        for n in range(12):
            assert good(server, n, expected) == "answered"
        with ThreadPoolExecutor(12) as pool:
            list(pool.map(lambda n: hangs_up(server, n, expected), range(24)))
        settle(server, threads)
        assert metric(server, "parscale_prompt_cache_sequences") <= 4
        # Each of those left has keys and values of at least 100 tokens, 3072 bytes a token.
        assert held(server) < before + 12 * 100 * 3072
        assert request(server, "GET", "/health").status == 200


def held(server) -> int:
    """Bytes of arrays, besides the prompts kept on purpose."""
    # What is kept on purpose is counted by the engine itself.
    post(server, CHAT, chat("the last"))
    gc.collect()
    statistics = server.serving.engine.statistics()
    return mx.get_active_memory() - int(statistics["kept_bytes"])


def settle(server, threads: int) -> None:
    end = time.monotonic() + 20

    def is_busy() -> bool:
        counts = server.serving.engine.statistics()
        asked = server.serving.busy or server.server_state.connections
        return asked or counts["waiting"] + counts["running"] > 0

    while is_busy() and time.monotonic() < end:
        time.sleep(0.05)
    assert not server.serving.busy and not server.server_state.connections
    for name in ("parscale_requests_waiting", "parscale_requests_running"):
        assert metric(server, name) == 0
    statistics = server.serving.engine.statistics()
    assert statistics["waiting"] == statistics["running"] == 0
    # The loop's pool, which reads requests, keeps its threads.
    assert threading.active_count() <= threads + 1 + min(32, (os.cpu_count() or 1) + 4)


def test_connections_that_do_nothing_leave_room_for_others(opened):
    with serving(opened, max_concurrent=1, read_timeout=4) as server:
        idle = [raw(server, b"") for _ in range(80)]
        # The last to connect are refused at once, so by now all have been taken or refused.
        refused = [client for client in idle[65:] if b" 503 " in client.recv(1000)]
        assert len(refused) == 15
        assert len(server.server_state.connections) <= 65
        end = time.monotonic() + 15
        while len(server.server_state.connections) > 1 and time.monotonic() < end:
            time.sleep(0.1)
        assert post(server, CHAT, chat("Hi")).status == 200
        for client in idle:
            client.close()
