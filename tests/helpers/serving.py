"""A server in this process, a client that can misbehave, and what the answers should be."""

import json
import socket
import time
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from email.message import Message
from http.client import HTTPConnection
from threading import Thread
from typing import Any

from parscale_mlx import generate
from parscale_mlx.engine import MlxEngine

import mlx.core as mx
from parscale_core.serve.server import Server, bind
from parscale_core.serve.settings import Settings

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"


@contextmanager
def serving(opened, *, name="tiny", draft=None, engine=None, **settings):
    """A server on a free loopback port.

    Args:
        opened: what ``open_models`` gave.
        draft: a model, or the name of one of those served.
        engine: options of ``MlxEngine``.
    """
    models, tokenizer = opened
    limits = Settings(**settings)
    options = dict(engine or {}, batch_size=limits.max_concurrent)
    if isinstance(draft, str):
        limits = replace(limits, draft=draft if draft == "ngram" else int(draft.rpartition("p")[2]))
    elif draft is not None:
        limits, options = replace(limits, draft="model"), options | {"draft_model": draft}
    # The most streams are the default.
    ordered = dict(sorted(models.items(), reverse=True))
    engine = MlxEngine(ordered, tokenizer, **options)
    with running(engine, name, limits) as server:
        yield server


@contextmanager
def running(engine, name="tiny", settings=None):
    """A server over an engine, which is closed after it."""
    with bind("127.0.0.1", 0) as bound:
        server = Server(engine, bound, name, settings or Settings())
        thread = Thread(target=run, args=(server,))
        thread.start()
        try:
            while not server.started:
                time.sleep(0.005)
            yield server
        finally:
            server.serving.stop()
            thread.join(30)
            engine.close()
            assert not thread.is_alive()


def run(server: Server) -> None:
    with suppress(RuntimeError):  # that the engine failed is what a test may be about
        server.run()


@dataclass
class Answer:
    status: int
    headers: Message
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)

    def error(self) -> str:
        error = self.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}
        return error["message"]

    def text(self) -> str:
        choice = self.json()["choices"][0]
        return choice["text"] if "text" in choice else choice["message"]["content"] or ""

    def chunks(self) -> list[dict]:
        lines = [line for line in self.body.decode().split("\n\n") if line.startswith("data: ")]
        assert lines[-1] == "data: [DONE]", lines[-1:]
        return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def request(server: Server, method: str, path: str, body=None, headers=None) -> Answer:
    """One request; ``body`` is bytes, or becomes JSON."""
    connection = HTTPConnection("127.0.0.1", server.port, timeout=60)
    try:
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        connection.request(method, path, data, headers or {})
        response = connection.getresponse()
        return Answer(response.status, response.headers, response.read())
    finally:
        connection.close()


def post(server: Server, path: str, body, headers=None) -> Answer:
    return request(server, "POST", path, body, headers)


def chat(text: str, **fields) -> dict:
    return {"messages": [{"role": "user", "content": text}], "max_tokens": 8, **fields}


def raw(server: Server, data: bytes) -> socket.socket:
    """A connection on which bytes are sent as they are."""
    connection = socket.create_connection(("127.0.0.1", server.port), timeout=60)
    connection.sendall(data)
    return connection


def raw_post(path: str, body: dict) -> bytes:
    data = json.dumps(body).encode()
    return b"POST %s HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n%s" % (
        path.encode(),
        len(data),
        data,
    )


def metric(server: Server, name: str, **labels) -> float:
    value = server.serving.metrics.registry.get_sample_value(name, labels)
    return 0.0 if value is None else value


@dataclass
class Reference:
    """What the models answer, by the Python interface and one sequence at a time."""

    models: dict
    tokenizer: Any

    def ids(self, text: str) -> list[int]:
        return self.tokenizer.encode(f"<|user|>{text}\n<|assistant|>", add_special_tokens=False)

    def chat(self, text: str, n: int = 8, streams: int = 4) -> str:
        return self.text(self.ids(text), n, streams)

    def text(self, ids: list[int], n: int, streams: int = 4) -> str:
        return generate(self.models[streams], self.tokenizer, ids, max_tokens=n)

    def goes_on(self, ids: list[int], n: int, streams: int = 4) -> str:
        """The text of greedy tokens, with a space that it may begin with."""
        tokens = list(ids)
        for _ in range(n):
            tokens.append(int(mx.argmax(self.models[streams](mx.array([tokens]))[0, -1]).item()))
        return self.tokenizer.decode(tokens[len(ids) :])

    def weights(self, prompt: list[int], tokens: list[int], streams: int) -> list[list[float]]:
        """Of each generated token, the streams' weights in the state that gave it."""
        ids = mx.array([prompt + tokens[:-1]])
        return self.models[streams].aggregation_weights(ids).tolist()[0][len(prompt) - 1 :]
