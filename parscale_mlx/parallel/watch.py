"""Notice a rank that dies: a collective operation that waits for it may never return.

Every rank keeps a TCP connection to rank 0 beside MLX's own. A byte a second goes through it, and
when a rank leaves, how; the operating system closes it for a process that dies without a word, its
keepalive finds a machine that is gone, and a process that is frozen sends nothing.
"""

import json
import os
import secrets
import select
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from parscale_mlx.parallel.ranks import all_sum, gather_bytes

import mlx.core as mx
from parscale_core.engine.defaults import WATCH_TIMEOUT
from parscale_core.error_text import one_line

CONNECT = 10.0  # seconds to wait for the connections of all ranks
GRACE = 1.0  # seconds for this rank to fail by itself, when another one says why it failed
SETTLE = 3.0  # seconds for the watch to hear what broke a collective operation
KEEPALIVE = {"TCP_KEEPIDLE": 2, "TCP_KEEPALIVE": 2, "TCP_KEEPINTVL": 1, "TCP_KEEPCNT": 4}
DONE = "\0"
BEAT = b"\1"
PULSE = 1.0  # seconds between two beats


@contextmanager
def watched(group: mx.distributed.Group, timeout: float = WATCH_TIMEOUT) -> Iterator[None]:
    """While this runs, end this process when another rank dies, fails or freezes.

    Args:
        timeout: seconds without a sign of life from a rank.

    Rank 0 says on standard error which rank it was and why. Nothing is watched where the launcher
    tells no address of rank 0 (MPI, whose ``mpirun`` ends all ranks when one dies).

    Raises:
        OSError: the ranks cannot connect to rank 0.
        SystemExit: instead of an error on another rank than 0, which rank 0 has been told of.
    """
    address = _address()
    if group.size() == 1 or address is None:
        yield
        return
    watch = _Watch(group.rank(), _connect(group, address), timeout)
    try:
        yield
        # Nobody leaves while another rank still waits for its part of what is under way.
        mx.eval(all_sum(mx.array(1.0), group))
    except BaseException as error:
        if isinstance(error, RuntimeError):
            # A peer's death reaches the collective operation and the watch in either order.
            time.sleep(SETTLE)
        watch.leave(one_line(error, most=None))
        if watch.rank > 0 and isinstance(error, Exception):
            raise SystemExit(1) from error
        raise
    watch.leave(DONE)


class _Watch:
    def __init__(self, rank: int, connections: dict[int, socket.socket], timeout: float):
        self.rank = rank
        self.connections, self.timeout = connections, timeout
        self.leaving = threading.Event()
        threading.Thread(target=self._beat, daemon=True).start()
        for peer, connection in connections.items():
            threading.Thread(target=self._listen, args=(peer, connection), daemon=True).start()

    def _beat(self) -> None:
        while not self.leaving.wait(min(PULSE, self.timeout / 4)):
            for connection in self.connections.values():
                with suppress(OSError):
                    connection.send(BEAT, socket.MSG_DONTWAIT)

    def leave(self, message: str) -> None:
        """Tell the connected ranks how this one ends."""
        self.leaving.set()
        for connection in self.connections.values():
            with suppress(OSError):
                connection.sendall(message.encode())
                connection.shutdown(socket.SHUT_RDWR)

    def _listen(self, peer: int, connection: socket.socket) -> None:
        received, frozen = b"", False
        try:
            while data := self._receive(connection):
                received += data.replace(BEAT, b"")
        except TimeoutError:
            frozen = True
        except OSError:
            pass
        message = received.decode()
        if message == DONE or (message and self.leaving.wait(GRACE)) or self.leaving.is_set():
            return
        text = f"rank {peer}: {message}" if message else f"rank {peer} has died"
        if frozen:
            text = f"rank {peer} has given no sign of life for {self.timeout:g} seconds"
        if self.rank == 0 or not message:
            # Not through sys.stderr: on other ranks than 0 that may lead nowhere.
            os.write(2, f"Error: {text}\n".encode())
        self.leave(text)
        # Only so: the main thread may sit in a collective operation that never returns.
        os._exit(1)

    def _receive(self, connection: socket.socket) -> bytes:
        """What a rank sends next; b"" when it is gone.

        Raises:
            TimeoutError: nothing came for too long.
        """
        heard = time.monotonic()
        while True:
            before = time.monotonic()
            if select.select([connection], [], [], PULSE)[0]:
                return connection.recv(4096)
            # A process that was itself stopped for a while has heard nobody.
            heard += max(0.0, time.monotonic() - before - 2 * PULSE)
            if time.monotonic() - heard > self.timeout:
                raise TimeoutError


def _address() -> str | None:
    """Where the launcher told all ranks to find rank 0."""
    if file := os.environ.get("MLX_HOSTFILE"):  # ring
        return json.loads(Path(file).read_text())[0][0].rpartition(":")[0]
    if coordinator := os.environ.get("MLX_JACCL_COORDINATOR"):
        return coordinator.rpartition(":")[0]
    return os.environ.get("NCCL_HOST_IP")


def _connect(group: mx.distributed.Group, address: str) -> dict[int, socket.socket]:
    """On rank 0 a connection to every other rank, on another the one to rank 0."""
    rank = group.rank()
    server = socket.create_server((address, 0)) if rank == 0 else None
    port = server.getsockname()[1] if server is not None else 0
    meeting = port.to_bytes(2, "big") + secrets.token_bytes(16)
    meeting = gather_bytes(group, meeting)[0]
    if server is not None:
        with server:
            connections = _accept(server, group.size(), meeting[2:])
    else:
        target = (address, int.from_bytes(meeting[:2], "big"))
        try:
            connection = socket.create_connection(target, timeout=CONNECT)
        except OSError as error:
            raise OSError(f"rank {rank} cannot reach rank 0 at {address}: {error}") from error
        connection.sendall(meeting[2:] + rank.to_bytes(4, "big"))
        connections = {0: connection}
    for connection in connections.values():
        _keep_alive(connection)
    return connections


def _accept(server: socket.socket, size: int, secret: bytes) -> dict[int, socket.socket]:
    connections: dict[int, socket.socket] = {}
    deadline = time.monotonic() + CONNECT
    while len(connections) < size - 1:
        server.settimeout(max(0.01, deadline - time.monotonic()))
        try:
            connection, _ = server.accept()
            connection.settimeout(CONNECT)
            hello = connection.recv(len(secret) + 4, socket.MSG_WAITALL)
        except OSError as error:
            missing = sorted(set(range(1, size)) - connections.keys())
            raise OSError(f"no connection from rank {missing[0]}: {error}") from error
        if hello[: len(secret)] == secret:
            connections[int.from_bytes(hello[len(secret) :], "big")] = connection
        else:
            connection.close()
    return connections


def _keep_alive(connection: socket.socket) -> None:
    connection.settimeout(None)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in KEEPALIVE.items():
        if hasattr(socket, name):  # Linux and macOS name the idle time differently
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
