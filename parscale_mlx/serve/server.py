"""The server: connections, places for requests, a graceful stop."""

import logging
import signal
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import ThreadingHTTPServer
from ipaddress import ip_address
from threading import Condition, Event, Thread
from typing import Any

from parscale_mlx.serve.answers import AnswerGenerator
from parscale_mlx.serve.failure import RequestFailed
from parscale_mlx.serve.handler import Handler
from parscale_mlx.serve.metrics import Metrics
from parscale_mlx.serve.models import ServedModels

from mlx_lm.server import get_system_fingerprint

LOG = logging.getLogger("parscale.serve")
# Connections beyond the requests in work: those that are refused, and what watches the server.
SPARE_CONNECTIONS = 64
PATIENCE = 0.1  # seconds to wait for a place
LOOPBACK_NAMES = ("localhost", "127.0.0.1", "[::1]")
FULL = b"HTTP/1.0 503 Service Unavailable\r\nRetry-After: 1\r\nContent-Length: 0\r\n\r\n"


class Server(ThreadingHTTPServer):
    """Binds an address and starts the generation thread; ``serve_forever`` answers requests.

    Args:
        port: 0 for a free one; ``server_port`` says which.

    Raises:
        OSError: the address cannot be had.
    """

    # Joined when the server closes, so that what was written is sent and nothing outlives MLX.
    daemon_threads = False
    request_queue_size = 128

    def __init__(self, models: ServedModels, host: str, port: int):
        self.models, self.settings = models, models.settings
        self.metrics, self.created = Metrics(), int(time.time())
        self.fingerprint = get_system_fingerprint()
        self.stopping, self.abandoned, self.busy = Event(), False, 0
        self.changed = Condition()
        # Since when each connection's request is being read; None once it is.
        self.connections: dict[socket.socket, float | None] = {}
        try:
            self.address_family, *_, address = socket.getaddrinfo(
                host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
            )[0]
            super().__init__(address, Handler)  # type: ignore[arg-type]
        except OSError as error:
            raise OSError(f"cannot listen on {host}, port {port}: {error.strerror}") from error
        self.loopback = ip_address(str(self.server_address[0])).is_loopback
        self.answers = AnswerGenerator(models)
        prompts = self.answers.prompt_cache
        self.metrics.cache_bytes.set_function(lambda: prompts.nbytes)
        self.metrics.cached_prompts.set_function(lambda: len(prompts))

    @property
    def url(self) -> str:
        host, port = str(self.server_address[0]), self.server_port
        return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    @contextmanager
    def place(self) -> Iterator[None]:
        """One of the places for requests in work.

        Raises:
            RequestFailed: all are taken, or the server is stopping.
        """
        most = self.settings.max_concurrent
        with self.changed:
            if self.stopping.is_set():
                raise RequestFailed(503, "the server is stopping")
            # A client whose answer has come may ask again before its place is given back.
            free = self.changed.wait_for(lambda: self.busy < most, timeout=PATIENCE)
            if not free:
                raise RequestFailed(429, f"{self.busy} requests are in work; try again later")
            self.busy += 1
        try:
            yield
        finally:
            with self.changed:
                self.busy -= 1
                self.changed.notify_all()

    def health(self) -> tuple[int, dict[str, str]]:
        """An HTTP status, and why."""
        if self.stopping.is_set():
            return 503, {"status": "stopping"}
        return (200, {"status": "ok"}) if self.answers.is_healthy else (503, {"status": "failed"})

    def answers_to(self, host: str) -> bool:
        """Whether a ``Host`` header names this server.

        On a loopback address only loopback's names do: a site could have its own name lead here,
        and its pages would be of the same origin.
        """
        name = host if host.endswith("]") else host.rpartition(":")[0] or host
        return not self.loopback or not host or name.lower() in LOOPBACK_NAMES

    def stop(self) -> None:
        """Take no more requests; ``serve_forever`` returns when the running answers are finished.

        Called again, it ends those too.
        """
        if self.stopping.is_set():
            self.abandoned = True
        self.stopping.set()
        Thread(target=self._stop_when_idle, daemon=True).start()

    def _stop_when_idle(self) -> None:
        with self.changed:
            self.changed.wait_for(lambda: not self.busy)
        self.shutdown()

    def has_read(self, connection: socket.socket) -> None:
        """A connection's request is read."""
        with self.changed:
            self.connections[connection] = None

    def service_actions(self) -> None:
        if not self.answers.is_healthy and not self.stopping.is_set():
            LOG.error("generation has failed")
            self.stop()
        # A client that sends a byte now and then would never run into a time limit on each.
        limit = time.monotonic() - self.settings.read_timeout
        with self.changed:
            for connection, since in self.connections.items():
                if since is not None and since < limit:
                    _shut(connection, socket.SHUT_RD)

    def server_close(self) -> None:
        with self.changed:
            for connection in self.connections:
                _shut(connection, socket.SHUT_RDWR if self.abandoned else socket.SHUT_RD)
        super().server_close()

    def process_request(self, request: Any, client_address: Any) -> None:
        with self.changed:
            full = len(self.connections) >= self.settings.max_concurrent + SPARE_CONNECTIONS
            if not full:
                self.connections[request] = time.monotonic()
        if full:
            with suppress(OSError):
                request.send(FULL)
            self.shutdown_request(request)
            return
        super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            with self.changed:
                self.connections.pop(request, None)

    def handle_error(self, request: Any, client_address: Any) -> None:
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            LOG.error("a connection failed", exc_info=error)


def _shut(connection: socket.socket, how: int) -> None:
    with suppress(OSError):
        connection.shutdown(how)


@contextmanager
def open_server(models: ServedModels, host: str, port: int) -> Iterator[Server]:
    """A server whose generation thread ends with the block."""
    server = Server(models, host, port)
    try:
        yield server
    finally:
        server.server_close()
        server.answers.stop_and_join()


def serve_until_signalled(server: Server) -> None:
    """Serve until SIGTERM or SIGINT, then finish the running answers; a second signal ends them.

    Raises:
        RuntimeError: generation failed.
    """
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: server.stop())
    server.serve_forever(poll_interval=0.2)
    if not server.answers.is_healthy:
        raise RuntimeError("the generation thread has failed; the log says why")


def follow(models: ServedModels) -> None:
    """Compute what rank 0 serves, on another rank, until rank 0 stops.

    Raises:
        RuntimeError: generation failed.
    """
    # A terminal sends it to all ranks; rank 0 finishes its answers first.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    answers = AnswerGenerator(models)
    answers.join()
    if answers.failure is not None:
        raise RuntimeError(f"generation failed: {answers.failure}") from answers.failure
