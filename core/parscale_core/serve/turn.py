"""The answers to one HTTP request, as they come."""

import asyncio
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any
from uuid import uuid4

from parscale_core.engine import Piece
from parscale_core.error_text import one_line
from parscale_core.serve.api_errors import HUNG_UP, RequestFailed
from parscale_core.serve.ask import Ask, requests_of
from parscale_core.serve.metrics import AnswerWatch
from parscale_core.serve.tools import Call, CallReader


@dataclass
class Part:
    """What came of one answer.

    Attributes:
        index: which answer, counted from 0.
        text: without calls of tools.
        pieces: the tokens, those without text included.
        finish_reason: "stop", "length" or "tool_calls" on an answer's last part.
    """

    index: int
    text: str = ""
    calls: list[Call] = field(default_factory=list)
    pieces: list[Piece] = field(default_factory=list)
    finish_reason: str | None = None

    def add(self, other: "Part") -> None:
        self.text += other.text
        self.calls += other.calls
        self.pieces += other.pieces
        self.finish_reason = other.finish_reason or self.finish_reason


class Turn:
    """Has the engine answer, and counts.

    Args:
        arrived: when the request came, on ``time.monotonic``'s clock.
        model: the full name of the model.

    Attributes:
        prompt_tokens, cached_tokens, tokens: of all prompts and answers so far.
    """

    def __init__(self, serving: Any, ask: Ask, model: str, arrived: float):
        self.serving, self.ask, self.model, self.arrived = serving, ask, model, arrived
        self.id, self.created = uuid4().hex, int(time.time())
        self.prompt_tokens = sum(map(len, ask.prompts))
        self.cached_tokens = self.tokens = 0
        self.count = ask.n * len(ask.prompts)
        self._handles: list[Any] = []
        self._items: asyncio.Queue[tuple[int, Piece | Exception]] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()
        template = str(serving.engine.tokenizer.chat_template)
        self._readers = [
            CallReader(template, ask.tools) if ask.tools else None for _ in range(self.count)
        ]
        self._has_called: set[int] = set()

    def submit(self) -> None:
        """Ask the engine, on a thread that may wait.

        Raises:
            RequestFailed: it cannot answer.
        """
        deadline = self.arrived + self.serving.settings.timeout
        requests = requests_of(self.ask, self.serving, self.model, deadline)
        try:
            for index, request in enumerate(requests):
                handle = self.serving.engine.submit(request)
                self._handles.append(handle)
                handle.listen(lambda item, index=index: self._take(index, item))
        except Exception as error:
            self.cancel()
            raise self._failure(error) from error

    def cancel(self) -> None:
        for handle in self._handles:
            handle.cancel()

    async def parts(self) -> AsyncIterator[Part]:
        """Each token's part, of all answers as they come.

        Raises:
            RequestFailed: the time is over, the engine failed, or the server ends.
        """
        watch = AnswerWatch(self.serving.metrics, self.model, self.arrived, self.prompt_tokens)
        left = self.count
        try:
            while left:
                index, item = await self._items.get()
                if isinstance(item, Exception):
                    raise self._failure(item)
                if item.token is not None:
                    self.tokens += 1
                    # n answers share a prompt, which counts once.
                    cached = item.cached_tokens if index % self.ask.n == 0 else 0
                    self.cached_tokens += cached
                    watch.token(cached)
                yield self._part(index, item)
                left -= item.finish_reason is not None
        finally:
            watch.end()
            self.cancel()

    async def whole(self) -> list[Part]:
        """All answers when they are finished.

        Raises:
            RequestFailed: as ``parts``.
        """
        answers = [Part(index) for index in range(self.count)]
        async for part in self.parts():
            answers[part.index].add(part)
        return answers

    def said(self, pieces: list[Piece]) -> list[Piece]:
        """The tokens that are part of a text: not the one that ended it."""
        ends = self.serving.engine.end_tokens
        return [piece for piece in pieces if piece.token not in ends and piece.token is not None]

    def _part(self, index: int, piece: Piece) -> Part:
        if piece.finish_reason == "timeout":
            raise RequestFailed(504, "the answer took longer than this server allows", "timeout")
        if piece.finish_reason == "cancelled":
            status = 503 if self.serving.stopping else HUNG_UP
            raise RequestFailed(status, "the server has ended this answer")
        part = Part(index, piece.text, [], [piece], piece.finish_reason)
        reader = self._readers[index]
        if reader is not None:
            part.text, part.calls = reader.push(piece.text)
            if piece.finish_reason is not None:
                text, calls = reader.flush()
                part.text, part.calls = part.text + text, part.calls + calls
            if part.calls:
                self._has_called.add(index)
            if part.finish_reason == "stop" and index in self._has_called:
                part.finish_reason = "tool_calls"
        return part

    def _take(self, index: int, item: Piece | Exception) -> None:
        try:
            self._loop.call_soon_threadsafe(self._items.put_nowait, (index, item))
        except RuntimeError:
            self.cancel()  # the server has ended, and its loop with it

    def _failure(self, error: Exception) -> RequestFailed:
        if isinstance(error, RequestFailed):
            return error
        message = one_line(error, most=500)
        if isinstance(error, ValueError):
            return RequestFailed(400, message)
        if isinstance(error, ArithmeticError):
            return RequestFailed(500, f"generation failed: {message}")
        self.serving.fail(error)
        return RequestFailed(503, "the server's generation has failed")
