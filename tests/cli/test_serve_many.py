"""``parscale serve`` on each runtime under 10,000 requests, and under bodies that make no sense."""

import copy
import json
import os
import random
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

from parscale_mlx.engine import open_engine

import psutil
import pytest
from helpers.serving import CHAT, TEXT, Answer, chat, post, request, running
from parscale_core.serve.settings import Settings

pytestmark = pytest.mark.slow
COUNT = int(os.environ.get("PARSCALE_SERVE_COUNT", "10000"))
AT_ONCE = 64
SETTINGS = Settings(max_concurrent=AT_ONCE, max_tokens=400)


@pytest.fixture(params=["mlx", "onnx"])
def server(request, model, tmp_path_factory, parscale):
    if request.param == "mlx":
        engine = open_engine(model, batch_size=AT_ONCE)
    else:
        from parscale_export.runtime.opening import open_engine as open_export

        export = tmp_path_factory.mktemp("exports") / "p4"
        parscale("export-onnx", "--model", model, "-o", export, "--aggregation-weights")
        engine = open_export(export, slots=16)
    with running(engine, "tiny", SETTINGS) as server:
        yield server


def body(n: int) -> dict:
    fields = chat(f"question {'abcdefgh'[n % 8] * (1 + n % 13)} {n}", max_tokens=4 + n % 9)
    fields |= {"logprobs": True, "stream_weights": True, "stream": n % 3 == 0}
    if n % 5 == 0:
        fields |= {"temperature": 1.0, "seed": n}
    return fields


def told(answer: Answer) -> tuple[str, list[float], list[list[float]]]:
    """The text, the log-probabilities and the weights of an answer."""
    assert answer.status == 200, answer.body
    if answer.body.startswith(b"{"):
        choices = answer.json()["choices"]
        text = choices[0]["message"]["content"]
    else:
        choices = [chunk["choices"][0] for chunk in answer.chunks()]
        text = "".join(choice["delta"].get("content", "") for choice in choices)
    logprobs = [t["logprob"] for choice in choices for t in choice["logprobs"]["content"]]
    weights = [t["weights"] for choice in choices for t in choice["parscale_streams"]]
    return text, logprobs, weights


def test_ten_thousand_requests(server):
    kinds = 240
    expected = [told(post(server, CHAT, body(n))) for n in range(kinds)]
    numbers = [n % kinds for n in range(COUNT)]
    random.Random(1).shuffle(numbers)
    process, measured = psutil.Process(), []

    def ask(n: int) -> None:
        text, logprobs, weights = told(post(server, CHAT, body(n)))
        assert text == expected[n][0], "another's text"
        assert logprobs == pytest.approx(expected[n][1], abs=1e-3)
        for ours, alone in zip(weights, expected[n][2], strict=True):
            assert ours == pytest.approx(alone, abs=1e-3)

    with ThreadPoolExecutor(AT_ONCE) as pool:
        for part in range(4):
            list(pool.map(ask, numbers[part::4]))
            measured.append((process.memory_info().rss, process.num_fds()))
    print(measured)
    assert server.serving.busy == 0 and not server.serving.turns
    # Once all its buffers are there, nothing grows.
    assert measured[3][0] < measured[1][0] * 1.1 + (8 << 20)
    assert measured[3][1] <= measured[1][1] + 8


# fmt: off
VALUES = [None, True, False, 0, 1, -1, 2**63, 10**30, 0.5, 1e308, "", "x", "\ud800", "ä" * 300,
          [], {}, [None], [[]], {"a": None}, {"type": "text"}, {"type": "function"}, ["x", 5]]
BODIES = {
    CHAT: chat("Hi", n=1, stop=["x"], logit_bias={"5": 1}, seed=1, stream_options={},
               response_format={"type": "json_schema", "json_schema": {"schema": {}}},
               tools=[], tool_choice="auto", logprobs=True, top_logprobs=2, stream=False),
    TEXT: {"prompt": ["ab", "cd"], "max_tokens": 2, "logprobs": 1, "n": 1, "echo": False},
    "/v1/responses": {"input": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}],
                      "max_output_tokens": 2, "instructions": "x", "stream": False,
                      "text": {"format": {"type": "json_schema", "name": "x", "schema": {}}}},
    "/v1/messages": {"messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}],
                     "max_tokens": 2, "system": "x", "stop_sequences": ["x"], "stream": False},
}
# fmt: on


def places(value, path=()):
    """The ways to all values in a body."""
    yield path
    keys = (
        value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    )
    for key in keys:
        yield from places(value[key], (*path, key))


def mutated(fields: dict, rng: random.Random) -> dict:
    fields = copy.deepcopy(fields)
    for _ in range(rng.randint(1, 3)):
        path = rng.choice([p for p in places(fields) if p])
        holder = fields
        for key in path[:-1]:
            holder = holder[key]
        action = rng.random()
        if action < 0.2:
            del holder[path[-1]]
        elif action < 0.3 and isinstance(holder, dict):
            holder[rng.choice(["unknown", "model", "type", "$ref", "pattern"])] = copy.deepcopy(
                rng.choice(VALUES)
            )
        else:
            holder[path[-1]] = copy.deepcopy(rng.choice(VALUES))
    return fields


def test_bodies_that_make_no_sense(model):
    rng = random.Random(7)
    with running(open_engine(model), "tiny", SETTINGS) as server, ThreadPoolExecutor(8) as pool:

        def ask(n: int) -> tuple[int, str]:
            path = list(BODIES)[n % 4]
            data = json.dumps(mutated(BODIES[path], random.Random(n))).encode()
            if n % 10 == 0:
                cut = random.Random(n).randrange(len(data))
                data = data[:cut] + bytes([rng.randrange(256)]) + data[cut + 1 :]
            answer = post(server, path, data)
            assert answer.status < 500, (path, data, answer.body)
            if answer.status >= 400:
                assert answer.json()["error"]["message"] and b"\\n" not in answer.body
            return answer.status, path

        statuses = [status for status, _ in pool.map(ask, range(2000))]
        assert {200, 400, 404} == set(statuses)
        assert request(server, "GET", "/health").status == 200


def test_what_the_openapi_document_allows(model):
    command = [sys.executable, "-m", "schemathesis.cli", "run", "--checks", "not_a_server_error"]
    command += ["--max-examples", "20", "--phases", "fuzzing", "--seed", "1", "--no-color"]
    with running(open_engine(model), "tiny", Settings(max_tokens=8)) as server:
        run = subprocess.run(
            [*command, f"{server.url}/openapi.json"], capture_output=True, text=True, timeout=500
        )
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-1000:]
