"""What every request passes: who may ask, what the log and the metrics say of it."""

import hmac
import logging
import time
from typing import Any

from starlette.datastructures import Headers
from starlette.responses import Response

from parscale_core.serve.answer_json import AnswerJson
from parscale_core.serve.api_errors import HUNG_UP, RequestFailed
from parscale_core.serve.exchange import APIS

LOG = logging.getLogger("parscale.serve")
LOOPBACK_NAMES = ("localhost", "127.0.0.1", "[::1]")
MOST_HEADERS, MOST_PATH = 100, 1 << 16
OPEN = ("/", "/health", "/docs", "/openapi.json")
KNOWN = ("/metrics", "/v1/models", *OPEN, *APIS)
ASSETS = "/static-offline-docs/"


class Gate:
    """An ASGI application around another.

    Args:
        is_loopback: only this machine can reach the server.
    """

    def __init__(self, app: Any, serving: Any, is_loopback: bool):
        self.app, self.serving, self.is_loopback = app, serving, is_loopback

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        asked, headers = scope["method"], Headers(scope=scope)
        scope = dict(scope) | {"parscale.arrived": time.monotonic()}
        if asked == "HEAD":
            scope["method"] = "GET"  # the connection leaves the body out
        status = 0

        async def answer(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                own = {"x-content-type-options": "nosniff", "server": "parscale"}
                own |= self._cors(headers)
                more = [(k.encode(), v.encode("latin-1")) for k, v in own.items()]
                message = message | {"headers": [*message.get("headers", ()), *more]}
            await send(message)

        try:
            try:
                response = self._check(scope, headers)
                await (response or self.app)(scope, receive, answer)
            except RequestFailed as failure:
                body = failure.body(scope["path"])
                await AnswerJson(body, failure.status)(scope, receive, answer)
        except Exception:  # the application has answered
            LOG.exception("a request failed")
        finally:
            status = HUNG_UP if scope.get("parscale.hung_up") or not status else status
            self._note(scope, asked, status)

    def _check(self, scope: Any, headers: Headers) -> Response | None:
        """An answer that needs no application, or None.

        Raises:
            RequestFailed: the request may not pass.
        """
        if len(scope["headers"]) > MOST_HEADERS:
            raise RequestFailed(431, f"a request may have {MOST_HEADERS} headers here")
        if len(scope["raw_path"]) + len(scope["query_string"]) > MOST_PATH:
            raise RequestFailed(414, f"a path may have {MOST_PATH} bytes here")
        host, origin = headers.get("host", ""), headers.get("origin")
        if not self._answers_to(host):
            raise RequestFailed(403, f"this server is not called {host[:200]!r}")
        own = (None, f"http://{host}", f"https://{host}")
        # A browser lets pages of other sites send requests anywhere.
        if origin not in own and not self._allowed(origin):
            message = f"pages from {str(origin)[:200]} may not call this server (--allow-origin)"
            raise RequestFailed(403, message)
        if scope["method"] == "OPTIONS":
            return Response(status_code=204, headers={"Allow": "GET, HEAD, OPTIONS, POST"})
        if scope["path"] not in OPEN and not scope["path"].startswith(ASSETS):
            self._check_key(headers)
        return None

    def _check_key(self, headers: Headers) -> None:
        key = self.serving.settings.api_key
        scheme, _, token = headers.get("authorization", "").partition(" ")
        # Anthropic's clients have a header of their own.
        given = token.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "")
        if key is not None and not hmac.compare_digest(given.encode(), key.encode()):
            raise RequestFailed(401, "the API key is missing or wrong", "invalid_api_key")

    def _answers_to(self, host: str) -> bool:
        """Whether a ``Host`` header names this server.

        On a loopback address only loopback's names do: a site could have its own name lead here,
        and its pages would be of the same origin.
        """
        name = host if host.endswith("]") else host.rpartition(":")[0] or host
        return not self.is_loopback or not host or name.lower() in LOOPBACK_NAMES

    def _allowed(self, origin: str | None) -> bool:
        allowed = self.serving.settings.allowed_origins
        return origin is not None and ("*" in allowed or origin in allowed)

    def _cors(self, headers: Headers) -> dict[str, str]:
        origin = headers.get("origin")
        if origin is None or not self._allowed(origin):
            return {}
        wanted = headers.get("access-control-request-headers")
        return {
            "access-control-allow-origin": origin,
            "access-control-allow-methods": "GET, HEAD, POST, OPTIONS",
            "access-control-allow-headers": wanted or "Authorization, Content-Type",
            "vary": "Origin",
        }

    def _note(self, scope: Any, asked: str, status: int) -> None:
        path = scope["path"]
        known = path if path in KNOWN else "other"
        known = f"/v1{path}" if f"/v1{path}" in APIS else known
        self.serving.metrics.requests.labels(known, str(status)).inc()
        seconds = time.monotonic() - scope["parscale.arrived"]
        client = (scope.get("client") or ("?",))[0]
        LOG.info("%s %s %s %d %.3f s", client, asked, known, status, seconds)
