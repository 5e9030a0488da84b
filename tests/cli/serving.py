"""A server in this process, a client that can misbehave, and what the answers should be."""

import json
import socket
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPConnection
from threading import Thread
from typing import Any

from parscale_mlx import generate
from parscale_mlx.serve.models import ServedModels
from parscale_mlx.serve.server import Server, open_server
from parscale_mlx.serve.settings import Settings

import mlx.core as mx

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"


@contextmanager
def serving(opened, *, name="tiny", draft=None, **settings):
    """A server on a free loopback port over what ``open_models`` gave."""
    models, tokenizer = opened
    limits = Settings(**settings)
    served = ServedModels(models, tokenizer, name=name, settings=limits, draft=draft)
    with open_server(served, "127.0.0.1", 0) as server:
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield server
        finally:
            server.stop()
            thread.join(30)
            assert not thread.is_alive()


@dataclass
class Answer:
    status: int
    headers: dict[str, str]
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
    connection = HTTPConnection("127.0.0.1", server.server_port, timeout=60)
    try:
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        connection.request(method, path, data, headers or {})
        response = connection.getresponse()
        return Answer(response.status, dict(response.getheaders()), response.read())
    finally:
        connection.close()


def post(server: Server, path: str, body, headers=None) -> Answer:
    return request(server, "POST", path, body, headers)


def chat(text: str, **fields) -> dict:
    return {"messages": [{"role": "user", "content": text}], "max_tokens": 8, **fields}


def raw(server: Server, data: bytes) -> socket.socket:
    """A connection on which bytes are sent as they are."""
    connection = socket.create_connection(("127.0.0.1", server.server_port), timeout=60)
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
    value = server.metrics.registry.get_sample_value(name, labels)
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
