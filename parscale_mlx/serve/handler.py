"""One HTTP request: mlx-lm's handler, with what stands before and behind it."""

import hmac
import io
import json
import logging
import select
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.resources import files
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

from parscale_mlx.serve import body as bodies
from parscale_mlx.serve.answers import Request
from parscale_mlx.serve.details import Token, logprobs, old_logprobs, streams
from parscale_mlx.serve.failure import HUNG_UP, RequestFailed
from parscale_mlx.serve.metrics import CONTENT_TYPE, AnswerWatch
from parscale_mlx.taps import Piece, Pieces

from mlx_lm.server import APIHandler, CompletionRequest, GenerationContext, Response

if TYPE_CHECKING:
    from parscale_mlx.serve.server import Server

LOG = logging.getLogger("parscale.serve")
LINGER_SECONDS, LINGER_BYTES = 2.0, 64 << 20
PAGE_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
PATHS = ("/", "/health", "/metrics", "/v1/models", *bodies.PATHS)


class Handler(APIHandler):
    """Answers the one request of a connection."""

    server: "Server"

    def __init__(self, connection: socket.socket, address: Any, server: "Server"):
        self.arrived = time.monotonic()
        self.status: int | None = None
        self.sent = self.body_read = self.stream = False
        self.tokens: list[Token] = []
        super().__init__(
            server.answers, connection, address, server, system_fingerprint=server.fingerprint
        )

    def do_GET(self):
        with self._guarded() as path:
            if path == "/":
                page = files("parscale_mlx.serve").joinpath("page.html").read_bytes()
                policy = {"Content-Security-Policy": PAGE_POLICY}
                self._send(200, page, "text/html; charset=utf-8", policy)
            elif path == "/health":
                self._send_json(*self.server.health())
            elif path == "/metrics":
                self._check_key()
                self._send(200, self.server.metrics.exposition(), CONTENT_TYPE)
            elif path == "/v1/models" or path.startswith("/v1/models/"):
                self._check_key()
                self._send_models(unquote(path.removeprefix("/v1/models").lstrip("/")))
            elif path in bodies.PATHS:
                raise RequestFailed(405, f"{path} takes POST")
            else:
                raise RequestFailed(404, f"nothing at {path}")

    def do_POST(self):
        with self._guarded() as path:
            if path not in bodies.PATHS:
                raise RequestFailed(404, f"nothing takes POST at {path}")
            self._check_key()
            raw = self._read_body()
            with self.server.place():
                self._answer(bodies.PATHS[path], bodies.parse(raw))

    def do_OPTIONS(self):
        with self._guarded():
            self._send(204, b"", "text/plain")

    def _answer(self, path: str, fields: dict[str, Any]) -> None:
        number = fields.get("logprobs")
        self.old_logprobs = isinstance(number, int) and not isinstance(number, bool)
        fields = bodies.check(fields, path, self.server.models)
        self.with_streams = fields["stream_weights"]
        # mlx-lm's handler reads the request once more: what was checked, and nothing else.
        raw = json.dumps(fields).encode()
        self.path, self.rfile = path, io.BytesIO(raw)
        self.headers.replace_header("Content-Length", str(len(raw)))
        with AnswerWatch(self.server.metrics, fields["model"], self.arrived) as self.watch:
            super().do_POST()

    def handle_completion(self, request: CompletionRequest, stop_words: list[str]):
        super().handle_completion(
            Request(
                **vars(request),
                deadline=self.arrived + self.server.settings.timeout,
                hung_up=self._hung_up,
                observe=self._observe,
                pieces=Pieces(self.with_streams),
            ),
            stop_words,
        )

    def _observe(self, context: GenerationContext, response: Response, piece: Piece) -> None:
        self.watch.token(len(context.prompt), max(0, context.prompt_cache_count))
        self.tokens.append(Token(response, piece))

    def generate_response(self, *args, **parts) -> dict:
        response = super().generate_response(*args, **parts)
        # The tokens since the last chunk: one whose characters are incomplete makes no chunk.
        tokens, self.tokens = self.tokens, []
        choice, tokenizer = response["choices"][0], self.server.models.shared_tokenizer
        if self.logprobs or self.top_logprobs > 0:
            form = old_logprobs if self.old_logprobs else logprobs
            choice["logprobs"] = form(tokens, tokenizer)
        if self.with_streams:
            choice["parscale_streams"] = streams(tokens, tokenizer)
        return response

    def _send_models(self, name: str) -> None:
        names = self.server.models.names
        entries = [
            {"id": n, "object": "model", "created": self.server.created, "owned_by": "parscale"}
            for n in names
        ]
        if not name:
            self._send_json(200, {"object": "list", "data": entries})
        elif name in names:
            self._send_json(200, entries[names.index(name)])
        else:
            self.server.models.resolve(name)

    # What a request has to pass

    def setup(self) -> None:
        self.request.settimeout(self.server.settings.read_timeout)
        super().setup()

    @contextmanager
    def _guarded(self) -> Iterator[str]:
        try:
            self._check_origin()
            yield urlsplit(self.path).path
        except RequestFailed as failure:
            self._fail(failure)
        except OSError:
            self.status = HUNG_UP
        except Exception:
            LOG.exception("a request failed")
            self._fail(RequestFailed(500, "the server failed at this request"))

    def _check_key(self) -> None:
        key = self.server.settings.api_key
        given = self.headers.get("Authorization", "").removeprefix("Bearer ").strip()
        if key is not None and not hmac.compare_digest(given.encode(), key.encode()):
            raise RequestFailed(401, "the API key is missing or wrong", "invalid_api_key")

    def _check_origin(self) -> None:
        """Refuse pages of other sites: a browser lets them send requests anywhere."""
        host, origin = self.headers.get("Host", ""), self.headers.get("Origin")
        if not self.server.answers_to(host):
            raise RequestFailed(403, f"this server is not called {host!r}")
        if origin in (None, f"http://{host}", f"https://{host}") or self._allowed(origin):
            return
        raise RequestFailed(403, f"pages from {origin} may not call this server (--allow-origin)")

    def _allowed(self, origin: str | None) -> bool:
        allowed = self.server.settings.allowed_origins
        return origin is not None and ("*" in allowed or origin in allowed)

    def _set_cors_headers(self):
        headers = getattr(self, "headers", None)
        origin = headers.get("Origin") if headers else None
        if origin and self._allowed(origin):
            self.send_header("Access-Control-Allow-Origin", origin)
            self.send_header("Access-Control-Allow-Methods", "GET, POST, OPTIONS")
            self.send_header("Access-Control-Allow-Headers", "Authorization, Content-Type")
            self.send_header("Vary", "Origin")

    def _read_body(self) -> bytes:
        length, most = self.headers.get("Content-Length"), self.server.settings.max_request_bytes
        if length is None:
            raise RequestFailed(411, "Content-Length header is required")
        if not (length.isascii() and length.isdigit()):
            raise RequestFailed(400, "Invalid Content-Length header")
        if len(length) > 15 or int(length) > most:
            raise RequestFailed(413, f"a request may have {most} bytes here at most")
        try:
            raw = self.rfile.read(int(length))
        except TimeoutError:
            raise RequestFailed(408, "the request's body did not come in time") from None
        if len(raw) < int(length):
            raise RequestFailed(400, "the request's body is shorter than its Content-Length")
        self.body_read = True
        self.server.has_read(self.connection)
        return raw

    def _hung_up(self) -> bool:
        if self.server.abandoned:
            return True
        poll = select.poll()
        poll.register(self.connection, select.POLLIN)
        try:
            return bool(poll.poll(0)) and not self.connection.recv(1, socket.MSG_PEEK)
        except OSError:
            return True

    # What goes back

    def _fail(self, failure: RequestFailed) -> None:
        self.status = failure.status
        if failure.status == HUNG_UP:
            return
        error = {"message": failure.message, "type": failure.kind, "param": None}
        error["code"] = failure.code
        with suppress(OSError):
            if not self.sent:
                # mlx-lm may have begun to answer; what is not sent can be taken back.
                self._headers_buffer: list[bytes] = []
                retry = {"Retry-After": "1"} if failure.status in (429, 503) else {}
                self._send_json(failure.status, {"error": error}, retry)
                self._linger()
            elif self.stream:
                self.wfile.write(f"data: {json.dumps({'error': error})}\n\n".encode())

    def _linger(self) -> None:
        # Closing a connection with unread data on it resets it, and the client may lose the answer.
        if self.body_read or self.command in ("GET", "HEAD", "OPTIONS"):
            return
        self.connection.shutdown(socket.SHUT_WR)
        self.connection.settimeout(LINGER_SECONDS)
        end, left = time.monotonic() + LINGER_SECONDS, LINGER_BYTES
        while left > 0 and time.monotonic() < end:
            received = len(self.connection.recv(1 << 16))
            if not received:
                return
            left -= received

    def _send_json(self, status: int, value: dict, headers: dict[str, str] | None = None) -> None:
        self._send(status, json.dumps(value).encode(), "application/json", headers)

    def _send(
        self, status: int, data: bytes, kind: str, headers: dict[str, str] | None = None
    ) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("X-Content-Type-Options", "nosniff")
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self._set_cors_headers()
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    # http.server's own

    def send_response(self, code: int, message: str | None = None) -> None:
        self.status = code
        super().send_response(code, message)

    def end_headers(self) -> None:
        super().end_headers()
        self.sent = True

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        # The request could not even be read, and may have left http.server at HTTP/0.9, which sends
        # no status.
        self.request_version = self.protocol_version
        self._fail(RequestFailed(code, message or "not a request that is served here"))

    def finish(self) -> None:
        if self.status is not None:
            path = urlsplit(getattr(self, "path", "")).path
            known = path if path in PATHS else "other"
            self.server.metrics.requests.labels(known, str(self.status)).inc()
            seconds = time.monotonic() - self.arrived
            client = self.client_address[0]
            LOG.info("%s %s %s %d %.3f s", client, self.command, known, self.status, seconds)
        super().finish()

    def version_string(self) -> str:
        return "parscale"

    def log_message(self, format: str, *args: Any) -> None:
        LOG.debug(format, *args)
