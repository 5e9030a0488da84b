"""Ctrl-C: every command ends soon, with one line that says what is kept."""

import os
import select
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

import click
from parscale_core.checkpoint import output

# Longer than an orderly end takes; within it, compiled code may not come back to Python at all.
PATIENCE = 1.4  # seconds
GRACE = 0.3  # seconds that leaving takes at most, where Python can
KEPT = {
    "generate": "what is printed is the whole result",
    "chat": "the conversation is not kept",
    "serve": "requests in work have no end",
    "train": "parscale train --resume goes on from the last checkpoint",
}
NOTHING = "nothing was written"
CODE = 130  # what shells give for SIGINT
HANDLED = ("chat", "serve")  # commands for which Ctrl-C means something else at first
DONE = b"d"


@contextmanager
def ends_in_time(command: str | None) -> Iterator[None]:
    """Turn Ctrl-C into one line and exit code 130, within two seconds."""
    line = f"Interrupted: {KEPT.get(command or '', NOTHING)}"
    watched = _watched(line) if command not in HANDLED else nullcontext(False)
    with watched as is_own_process:
        try:
            yield
        except KeyboardInterrupt:
            click.echo(line, err=True)
            if is_own_process:  # to take all libraries down would take longer than that
                with suppress(OSError):
                    sys.stdout.flush()
                os._exit(CODE)
            raise click.exceptions.Exit(CODE) from None


@contextmanager
def _watched(line: str) -> Iterator[bool]:
    """Have another process end this one where it does not end itself in time after Ctrl-C.

    It asks a thread here to leave with the code for it. Where that cannot, since compiled code
    holds the interpreter's lock for as long as it computes, it kills this process. The signal
    itself writes to the pipe that the other process reads.
    """
    # A copy is safe only of a process that runs this alone, as that of a person's command does.
    if sys.platform == "win32" or threading.active_count() > 1 or "mlx.core" in sys.modules:
        yield False
        return
    ours, theirs = os.pipe()
    asked, ask = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(theirs)
        os.close(asked)
        with suppress(BaseException):
            _watch(ours, ask, line)
        os._exit(0)
    os.close(ours)
    os.close(ask)
    threading.Thread(target=_leave_when_asked, args=(asked,), daemon=True).start()
    os.set_blocking(theirs, False)
    before = signal.set_wakeup_fd(theirs, warn_on_full_buffer=False)

    def tell(folder: Path) -> None:
        os.write(theirs, f"+{folder}\0".encode())

    output.on_working_folder = tell
    try:
        yield True
    finally:
        signal.set_wakeup_fd(before)
        output.on_working_folder = None
        with suppress(OSError):
            os.write(theirs, DONE)
        os.close(theirs)
        with suppress(ChildProcessError):
            os.waitpid(child, 0)


def _leave_when_asked(pipe: int) -> None:
    if os.read(pipe, 1):
        os._exit(CODE)
    os.close(pipe)  # the other process is gone


def _watch(pipe: int, ask: int, line: str) -> None:
    """What the other process does, until the first one is done or dead."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent, interrupt = os.getppid(), bytes([signal.SIGINT])
    folders: list[str] = []
    while data := os.read(pipe, 1 << 16):
        *found, rest = data.split(b"\0")
        folders += [os.fsdecode(part[part.index(b"+") + 1 :]) for part in found if b"+" in part]
        if rest.endswith(DONE):
            return
        if interrupt not in data:
            continue
        ready, _, _ = select.select([pipe], [], [], PATIENCE)
        while ready and (data := os.read(pipe, 1 << 16)) and DONE not in data:
            ready, _, _ = select.select([pipe], [], [], PATIENCE)
        if ready or os.getppid() != parent:
            return
        os.write(2, f"\r{line}\n".encode())
        os.write(ask, b"1")
        time.sleep(GRACE)
        if os.getppid() == parent:
            os.kill(parent, signal.SIGKILL)
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)
        return
