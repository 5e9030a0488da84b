"""One connection: uvicorn's, with limits on how long a client may take."""

import asyncio
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

# Connections beyond the requests in work: those that are refused, and what watches the server.
SPARE = 64
FULL = b"HTTP/1.1 503 Service Unavailable\r\nRetry-After: 1\r\nContent-Length: 0\r\n\r\n"
# Who sends no more may still read (a half-closed connection), or be gone: only writing shows it.
PROBE, PROBE_SECONDS = b"HTTP/1.1 100 Continue\r\n\r\n", 5.0


class Connection(H11Protocol):
    """Answers the requests of a connection.

    Args:
        read_timeout: seconds for a client to send a request's head, and to take what it is sent.
        most: connections at a time.
    """

    def __init__(self, *args: Any, read_timeout: float, most: int, **options: Any):
        super().__init__(*args, **options)
        self.read_timeout, self.most = read_timeout, most
        self.half_closed = False
        self.timers: dict[str, asyncio.TimerHandle] = {}

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        if len(self.connections) > self.most:
            # It ends a turn of the loop later; until then it must not push out the next one.
            self.connections.discard(self)
            transport.write(FULL)
            transport.close()
        else:
            self._start("read", self.read_timeout, transport.close)

    def connection_lost(self, exc: Exception | None) -> None:
        for name in list(self.timers):
            self._cancel(name)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.cycle is not None and not self.cycle.response_complete:
            self._cancel("read")
        elif "read" not in self.timers:
            self._start("read", self.read_timeout, self.transport.close)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._start("write", self.read_timeout, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._cancel("write")

    def eof_received(self) -> bool:  # type: ignore[override]  # asyncio's has it so
        cycle = self.cycle
        if cycle is None or cycle.response_complete:
            return False
        self.half_closed = True
        if cycle.more_body:
            cycle.more_body = False
            cycle.message_event.set()
        self._start("probe", PROBE_SECONDS, self._probe)
        return True

    def on_response_complete(self) -> None:
        self._cancel("probe")
        if self.half_closed:
            self.transport.close()
        super().on_response_complete()

    def _probe(self) -> None:
        if not self.cycle.response_started and self.scope["http_version"] == "1.1":
            self.transport.write(PROBE)
        self._start("probe", PROBE_SECONDS, self._probe)

    def _start(self, name: str, seconds: float, act: Any) -> None:
        self._cancel(name)
        self.timers[name] = self.loop.call_later(seconds, act)

    def _cancel(self, name: str) -> None:
        timer = self.timers.pop(name, None)
        if timer is not None:
            timer.cancel()
