"""One request for an answer: read, answered, written, whichever API it is of."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import Response

from parscale_core.serve import body, chat_completions, completions, events, messages, responses
from parscale_core.serve.answer_json import AnswerJson
from parscale_core.serve.api_errors import HUNG_UP, RequestFailed
from parscale_core.serve.ask import Ask
from parscale_core.serve.turn import Turn

KEEPALIVE = 5.0  # seconds without an event until a comment says that there will be one


@dataclass(frozen=True)
class Api:
    """How one API asks and is answered.

    Attributes:
        ask: from its fields, and a tokenizer, to what the engine is asked.
        whole: the answer as a JSON object.
        stream: the same as events.
        count: the answer where none is generated.
    """

    schema: type[BaseModel]
    ask: Callable[[Any, Any], Ask]
    whole: Callable[..., dict[str, Any]]
    stream: Callable[[Any, Turn], AsyncIterator[bytes]]
    count: Callable[[Ask], dict[str, Any]] | None = None


APIS = {
    "/v1/chat/completions": Api(
        chat_completions.ChatRequest,
        chat_completions.ask,
        chat_completions.whole,
        chat_completions.stream,
    ),
    "/v1/completions": Api(
        completions.CompletionRequest, completions.ask, completions.whole, completions.stream
    ),
    "/v1/responses": Api(
        responses.ResponseRequest, responses.ask, responses.whole, responses.stream
    ),
    "/v1/messages": Api(messages.MessageRequest, messages.ask, messages.whole, messages.stream),
    "/v1/messages/count_tokens": Api(
        messages.CountRequest, messages.ask_count, messages.whole, messages.stream, messages.count
    ),
}


class Exchange(Response):
    """The response to one request, which reads the request too.

    Args:
        path: one of ``APIS``.
    """

    def __init__(self, serving: Any, path: str, request: Request):
        self.serving, self.path, self.request = serving, path, request
        self.turn: Turn | None = None
        self.has_begun = self.is_stream = False
        self.background = None

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        settings = self.serving.settings
        try:
            raw = await body.read(self.request, settings.max_request_bytes, settings.read_timeout)
            async with self.serving.place():
                await self._while_there(scope, receive, self._answer(raw, scope, send))
        except RequestFailed as failure:
            if failure.status == HUNG_UP:
                scope["parscale.hung_up"] = True
            elif not self.has_begun:
                response = AnswerJson(
                    failure.body(self.path), failure.status, headers=failure.headers
                )
                await response(scope, receive, send)
            elif self.is_stream and not self.serving.abandoned:
                error = failure.body(self.path)
                is_named = self.path in ("/v1/messages", "/v1/responses")
                named = {"type": "error"} | (error["error"] if "type" not in error else error)
                last = events.named(named) if is_named else events.data(error)
                await send({"type": "http.response.body", "body": last})

    async def _while_there(self, scope: Any, receive: Any, work: Any) -> None:
        """Await ``work``, unless the client hangs up before it is done."""

        async def hang_up() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass

        tasks = [asyncio.ensure_future(work), asyncio.ensure_future(hang_up())]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            if not tasks[0].done():
                raise RequestFailed(HUNG_UP, "the client has hung up")
            tasks[0].result()
        finally:
            if self.turn is not None:
                self.turn.cancel()
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _answer(self, raw: bytes, scope: Any, send: Any) -> None:
        # Reading JSON, templates, tokenizers and grammars takes long for a long request.
        api = APIS[self.path]
        fields, ask, model = await asyncio.to_thread(self._read, api, raw)
        if api.count is not None:
            self.has_begun = True
            await AnswerJson(api.count(ask))(scope, self.request.receive, send)
            return
        arrived = scope.get("parscale.arrived", time.monotonic())
        self.turn = turn = Turn(self.serving, ask, model, arrived)
        self.serving.turns.add(turn)
        try:
            await asyncio.to_thread(turn.submit)
            if not fields.stream:
                answer = api.whole(fields, turn, await turn.whole())
                self.has_begun = True
                await AnswerJson(answer)(scope, self.request.receive, send)
                return
            headers = [(b"content-type", b"text/event-stream"), (b"cache-control", b"no-cache")]
            self.has_begun = self.is_stream = True
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            async for event in _with_keepalives(api.stream(fields, turn)):
                await send({"type": "http.response.body", "body": event, "more_body": True})
            await send({"type": "http.response.body", "body": b""})
        finally:
            self.serving.turns.discard(turn)

    def _read(self, api: Api, raw: bytes) -> tuple[Any, Ask, str]:
        fields: Any = body.validate(api.schema, body.parse(raw))
        model = self.serving.names.resolve(fields.model)
        return fields, api.ask(fields, self.serving.engine.tokenizer), model


async def _with_keepalives(source: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """The events, and comments while there is none: the first at once."""
    began = time.monotonic()
    iterator = source.__aiter__()
    following = asyncio.ensure_future(anext(iterator))
    try:
        yield b": keepalive 0 s\n\n"
        while True:
            done, _ = await asyncio.wait([following], timeout=KEEPALIVE)
            if not done:
                yield f": keepalive {time.monotonic() - began:.0f} s\n\n".encode()
                continue
            try:
                event = following.result()
            except StopAsyncIteration:
                return
            yield event
            following = asyncio.ensure_future(anext(iterator))
    finally:
        following.cancel()
        await asyncio.gather(following, return_exceptions=True)
