"""Run a program that a model wrote, in a process of its own, with limits.

This keeps accidents small: a program that does not end, eats memory, fills the disk or starts
others. A program that means harm needs a machine of its own.
"""

import functools
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

CHILD = Path(__file__).with_name("sandbox_child.py")
# Nothing of this process's environment, where keys and tokens are.
ENVIRONMENT = {"PATH": os.defpath, "LANG": "C.UTF-8", "PYTHONDONTWRITEBYTECODE": "1"}


@dataclass
class Limits:
    """For one program: seconds of time, bytes of memory and of a file."""

    seconds: float = 5.0
    memory: int = 1 << 30
    file_size: int = 1 << 24


@dataclass
class Outcome:
    """Whether a program came to its end, and if not, why: "timed out" or an error's name."""

    passed: bool
    reason: str


def run_program(program: str, limits: Limits) -> Outcome:
    """Run a program; it passes if it reaches its end without an error."""
    # Printed once the program has ended: leaving it early with exit code 0 is not passing.
    word = secrets.token_hex(16)
    task = {
        "program": program,
        "word": word,
        "memory": limits.memory,
        "file_size": limits.file_size,
        "cpu_seconds": int(limits.seconds) + 1,
    }
    command = [*_apart(), sys.executable, "-I", str(CHILD)]
    with tempfile.TemporaryDirectory(prefix="parscale-") as folder:
        environment = ENVIRONMENT | {"HOME": folder, "TMPDIR": folder}
        process = subprocess.Popen(
            command,
            cwd=folder,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            said, _ = process.communicate(json.dumps(task).encode(), timeout=limits.seconds)
        except subprocess.TimeoutExpired:
            return Outcome(False, "timed out")
        finally:
            # The process and all that it started, which may hold its pipe open.
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            for pipe in (process.stdin, process.stdout):
                with suppress(OSError):
                    pipe.close()  # type: ignore[union-attr]
    last = said.decode(errors="replace").strip()
    if last == word:
        return Outcome(True, "passed")
    return Outcome(False, last[:100] if last.isidentifier() else "ended early")


@functools.cache
def _apart() -> tuple[str, ...]:
    """What starts a process with no network and no processes but its own, where it can be had."""
    command = ("unshare", "--user", "--net", "--pid", "--fork", "--kill-child", "--")
    if shutil.which("unshare") is None:
        return ()
    trial = subprocess.run([*command, "true"], capture_output=True, check=False)
    return command if trial.returncode == 0 else ()
