"""Run a function in several processes that are the ranks of an MLX ring on this machine."""

import json
import multiprocessing
import os
import socket
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

TIMEOUT = 120.0
LAUNCH = Path(sys.executable).with_name("mlx.launch")
PARSCALE = (sys.executable, "-c", "from parscale_cli.main import cli; cli()")


@dataclass
class Outcome:
    """How a rank ended: what its function returned, or None; its exit code; what it printed."""

    result: Any
    exit_code: int
    out: str
    err: str


class Ranks:
    """Processes that run ``function(*arguments)`` as the ranks of one ring.

    They are forked from a process that has imported the package, but never used MLX: importing it
    takes far longer than what is tested.
    """

    def __init__(self, count: int, function, *arguments):
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["parscale_mlx", "parscale_mlx.engine", "helpers.rank_jobs"])
        self.folder = tempfile.TemporaryDirectory()
        hostfile = Path(self.folder.name) / "hosts.json"
        hostfile.write_text(json.dumps([[f"127.0.0.1:{port}"] for port in free_ports(count)]))
        self.pipes, self.processes = [], []
        for rank in range(count):
            ours, theirs = context.Pipe(duplex=False)
            given = (rank, hostfile, theirs, function, arguments)
            process = context.Process(target=_run, args=given, daemon=True)
            # The server that forks starts with the first process; what other tests start must not
            # compute with a thread less than what they compare it with.
            with mock.patch.dict(os.environ, OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1"):
                process.start()
            theirs.close()
            self.pipes.append(ours)
            self.processes.append(process)

    def wait(self, timeout: float = TIMEOUT) -> list[Outcome]:
        """Wait for all of them to end; one that has not by then is killed (exit code -9)."""
        deadline = time.monotonic() + timeout
        results = [self._result(pipe, deadline) for pipe in self.pipes]
        for process in self.processes:
            process.join(max(0.1, deadline - time.monotonic()))
            process.kill()
            process.join()
        outcomes = []
        for rank, (process, result) in enumerate(zip(self.processes, results, strict=True)):
            out, err = self.output(rank), self.output(rank, "err")
            outcomes.append(Outcome(result, process.exitcode, out, err))
        self.folder.cleanup()
        return outcomes

    def output(self, rank: int, name: str = "out") -> str:
        """What a rank has printed so far, to standard output or ("err") to standard error."""
        file = Path(self.folder.name) / f"{rank}.{name}"
        return file.read_text() if file.exists() else ""

    @staticmethod
    def _result(pipe, deadline: float):
        try:
            return pipe.recv() if pipe.poll(max(0.0, deadline - time.monotonic())) else None
        except EOFError:
            return None


def run_ranks(count: int, function, *arguments) -> list[Outcome]:
    return Ranks(count, function, *arguments).wait()


def _run(rank: int, hostfile: Path, pipe, function, arguments) -> None:
    os.environ |= {"MLX_RANK": str(rank), "MLX_HOSTFILE": str(hostfile)}
    for descriptor, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(hostfile.with_name(f"{rank}.{name}"), os.O_WRONLY | os.O_CREAT), descriptor)
    sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
    pipe.send(function(*arguments))


def free_ports(count: int) -> list[int]:
    servers = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [server.getsockname()[1] for server in servers]
    for server in servers:
        server.close()
    return ports


def launched(count: int) -> list[str]:
    """The beginning of a command line: ``parscale`` in several processes by ``mlx.launch``."""
    port = str(free_ports(1)[0])
    options = ("-n", str(count), "--backend", "ring", "--starting-port", port)
    return [str(LAUNCH), *options, "--", *PARSCALE]
