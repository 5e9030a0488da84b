"""Listen, and stop gracefully."""

import logging
import socket
from functools import partial
from ipaddress import ip_address
from typing import Any

import uvicorn

from parscale_core.engine import Engine
from parscale_core.serve.access import Gate
from parscale_core.serve.app import make_app
from parscale_core.serve.connection import SPARE, Connection
from parscale_core.serve.serving import Serving
from parscale_core.serve.settings import Settings

LOG = logging.getLogger("parscale.serve")


def bind(host: str, port: int) -> socket.socket:
    """A socket that nobody can connect to before a server listens on it.

    Args:
        port: 0 for a free one.

    Raises:
        OSError: the address cannot be had.
    """
    try:
        family, *_, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        bound = socket.socket(family, socket.SOCK_STREAM)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise OSError(f"cannot listen on {host}, port {port}: {reason}") from error
    return bound


def is_loopback(bound: socket.socket) -> bool:
    return ip_address(bound.getsockname()[0].partition("%")[0]).is_loopback


class Server(uvicorn.Server):
    """Serves an engine; ``run`` returns when it was stopped and its answers are finished.

    Args:
        bound: from ``bind``.
        name: what clients call the model.
    """

    def __init__(self, engine: Engine, bound: socket.socket, name: str, settings: Settings):
        self.bound, self.serving = bound, Serving(engine, name, settings)
        connection: Any = partial(
            Connection,
            read_timeout=settings.read_timeout,
            most=settings.max_concurrent + SPARE,
        )
        config = uvicorn.Config(
            Gate(make_app(self.serving), self.serving, is_loopback(bound)),
            http=connection,
            ws="none",
            lifespan="off",
            loop="asyncio",
            log_config=None,
            # What fails is logged in ``access``; an answer that was cut off is none.
            log_level=logging.CRITICAL,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            h11_max_incomplete_event_size=1 << 17,
            timeout_keep_alive=max(5, int(settings.read_timeout)),
        )
        super().__init__(config)
        # Who connects from now on is answered as soon as the loop runs.
        bound.listen(config.backlog)

    @property
    def port(self) -> int:
        return self.bound.getsockname()[1]

    @property
    def url(self) -> str:
        host = self.bound.getsockname()[0]
        return f"http://[{host}]:{self.port}" if ":" in host else f"http://{host}:{self.port}"

    def run(self, sockets: list[socket.socket] | None = None) -> None:
        """Serve until SIGTERM or SIGINT, then finish the running answers; a second signal ends
        them.

        Raises:
            RuntimeError: the engine failed.
        """
        super().run(sockets or [self.bound])
        if self.serving.failure is not None:
            raise RuntimeError(f"generation failed: {self.serving.failure}")

    def handle_exit(self, sig: int, frame: Any) -> None:
        self.serving.stop()

    async def on_tick(self, counter: int) -> bool:
        serving = self.serving
        if serving.abandoned:
            for turn in list(serving.turns):
                turn.cancel()
            self.force_exit = True
        self.should_exit = serving.stopping and (not serving.busy or serving.abandoned)
        return await super().on_tick(counter)
