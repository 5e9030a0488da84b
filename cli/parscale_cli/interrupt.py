"""Ctrl-C: every command ends soon, with one line that says what is kept."""

import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import click

# Longer than an orderly end takes; within it, compiled code may not come back to Python at all.
PATIENCE = 1.5  # seconds
KEPT = {
    "generate": "what is printed is the whole result",
    "chat": "the conversation is not kept",
    "serve": "requests in work have no end",
    "train": "parscale train --resume goes on from the last checkpoint",
}
NOTHING = "nothing was written"
CODE = 130  # what shells give for SIGINT


@contextmanager
def ends_in_time(command: str | None) -> Iterator[None]:
    """Turn Ctrl-C into one line and exit code 130, within two seconds."""
    line = f"Interrupted: {KEPT.get(command or '', NOTHING)}"
    with _watched(line):
        try:
            yield
        except KeyboardInterrupt:
            click.echo(line, err=True)
            raise click.exceptions.Exit(CODE) from None


@contextmanager
def _watched(line: str) -> Iterator[None]:
    """End the process where Python's own KeyboardInterrupt does not arrive in time."""
    if threading.current_thread() is not threading.main_thread() or sys.platform == "win32":
        yield
        return
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    done = threading.Event()

    def watch() -> None:
        while received := theirs.recv(1):
            # A command that handles the signal itself is not to be ended.
            default = signal.getsignal(signal.SIGINT) is signal.default_int_handler
            if received[0] == signal.SIGINT and default and not done.wait(PATIENCE):
                from parscale_core.checkpoint.output import delete_working_folders

                delete_working_folders()
                os.write(2, f"\r{line}\n".encode())
                os._exit(CODE)

    before = signal.set_wakeup_fd(ours.fileno(), warn_on_full_buffer=False)
    threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        done.set()
        signal.set_wakeup_fd(before)
        ours.close()
