"""``parscale serve --parallel``: rank 0 answers, the others follow, and they end together."""

import os
import re
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from types import SimpleNamespace

import parscale_mlx

import pytest
from helpers import rank_jobs
from helpers.rank_processes import Ranks, run_ranks
from helpers.serving import CHAT, TEXT, Reference, chat, post, raw, raw_post, request

PATIENCE = 15.0  # seconds; it takes two or three, but tests share the machine


@pytest.fixture(scope="module")
def reference(model) -> Reference:
    loaded, tokenizer = parscale_mlx.load(model)
    return Reference({4: loaded}, tokenizer)


@contextmanager
def serving(model, *options, mode="streams"):
    """Two ranks that serve: they, and where a client finds rank 0."""
    run = ["serve", "--model", model, "--port", 0, "--parallel", mode, *options]
    arguments = [str(argument) for argument in run]
    ranks = Ranks(2, rank_jobs.run_command_of_rank, [arguments, arguments])
    try:
        deadline = time.monotonic() + 60
        while not (line := re.search(r"Serving .*:(\d+)\n", ranks.output(0, "err"))):
            assert time.monotonic() < deadline and ranks.processes[0].is_alive()
            time.sleep(0.05)
        yield ranks, SimpleNamespace(port=int(line[1]))
    finally:
        for process in ranks.processes:
            process.kill()


@pytest.mark.parametrize("mode", ["streams", "tensor"])
def test_the_answers_of_one_process(model, reference, mode):
    with serving(model, mode=mode) as (ranks, server):
        assert post(server, CHAT, chat("Hello")).text() == reference.chat("Hello")
        streamed = post(server, CHAT, chat("Hello", stream=True)).chunks()
        text = "".join(c["choices"][0]["delta"].get("content", "") for c in streamed)
        assert text == reference.chat("Hello")
        with ThreadPoolExecutor(2) as pool:
            asked = [("Hi there", 60), ("Good day", 40)]
            answers = pool.map(lambda a: post(server, CHAT, chat(a[0], max_tokens=a[1])), asked)
            assert [a.text() for a in answers] == [reference.chat(*a) for a in asked]
        sampled = chat("Hi", logit_bias={"318": 100}, stream_weights=True, temperature=1)
        choice = post(server, CHAT, sampled).json()["choices"][0]
        assert choice["message"]["content"] == reference.tokenizer.decode([318] * 8)
        assert len(choice["parscale_streams"][0]["weights"]) == 4
        seeded = chat("Hi", seed=1, temperature=1.5)
        assert post(server, CHAT, seeded).text() == post(server, CHAT, seeded).text() != ""
        # Asked for anew: a prompt whose keys and values are kept.
        assert post(server, CHAT, chat("Hello", temperature=0)).text() == reference.chat("Hello")
        os.kill(ranks.processes[0].pid, signal.SIGTERM)
        first, second = ranks.wait(PATIENCE)
    assert (first.exit_code, second.exit_code) == (0, 0), first.err
    assert second.out == second.err == "" and "Error" not in first.err


def test_a_client_that_hangs_up(model, reference):
    with serving(model) as (_, server):
        with long_answer(server):
            pass
        ids = reference.ids("Hello")
        answer = post(server, TEXT, {"prompt": ids, "max_tokens": 8})
        assert answer.text() == reference.goes_on(ids, 8)
        metrics = request(server, "GET", "/metrics").body.decode()
        assert "parscale_requests_running 0.0" in metrics


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_rank_ends_the_server(model, rank):
    with serving(model) as (ranks, server), long_answer(server):
        killed = time.monotonic()
        ranks.processes[rank].kill()
        other = ranks.wait(2 * PATIENCE)[1 - rank]
        assert time.monotonic() - killed < PATIENCE
    assert other.exit_code == 1
    assert other.err.count(f"Error: rank {rank} has died\n") == 1
    assert "Traceback" not in other.err


def test_a_draft_is_refused(model):
    run = ["serve", "--model", str(model), "--draft-model", str(model), "--parallel", "streams"]
    first, second = run_ranks(2, rank_jobs.run_command_of_rank, [run, run])
    assert (first.exit_code, second.exit_code > 0) == (2, True)
    assert "--draft-model cannot go with --parallel" in first.err


def test_ranks_that_would_serve_differently(model):
    run = ["serve", "--model", str(model), "--port", "0", "--parallel", "streams"]
    first, second = run_ranks(2, rank_jobs.run_command_of_rank, [run, [*run, "--name", "other"]])
    assert (first.exit_code, second.exit_code) == (1, 1)
    assert first.err.startswith("Error: rank 1 differs from rank 0: its name of the model is other")


@contextmanager
def long_answer(server):
    """A connection on which an answer is coming that would go on for a long time."""
    body = chat("Hi", max_tokens=2000, stream=True, logit_bias={"319": -100})
    with raw(server, raw_post(CHAT, body)) as connection:
        while b"data: " not in connection.recv(4096):
            pass
        yield connection
