"""The process in which one program runs: its limits, the program, then a word that says so.

It reads {"program", "word", "memory", "file_size", "cpu_seconds"} as JSON from standard input.
"""

import contextlib
import json
import os
import sys
from typing import Any


def main() -> None:
    task = json.load(sys.stdin)
    answer = os.dup(1)
    nothing = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nothing, stream)
    set_limits(task)
    said = task["word"]
    try:
        exec(compile(task["program"], "program.py", "exec"), {"__name__": "__main__"})
    except BaseException as error:
        said = type(error).__name__
    os.write(answer, said.encode())
    os._exit(0)


def set_limits(task: dict[str, Any]) -> None:
    try:
        import resource
    except ImportError:  # no such limits on this system
        return
    limits = {
        "RLIMIT_AS": task["memory"],
        "RLIMIT_DATA": task["memory"],
        "RLIMIT_FSIZE": task["file_size"],
        "RLIMIT_CPU": task["cpu_seconds"],
        "RLIMIT_CORE": 0,
    }
    for name, value in limits.items():
        # macOS knows some of them by name only.
        with contextlib.suppress(AttributeError, OSError, ValueError):
            resource.setrlimit(getattr(resource, name), (value, value))


main()
