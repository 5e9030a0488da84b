"""The command line on a pseudo-terminal."""

import fcntl
import json
import os
import pty
import select
import struct
import subprocess
import sys
import termios
from collections.abc import Sequence

COMMANDS = (
    "import json, sys; from parscale_cli.main import cli\n"
    "for command in json.loads(sys.argv[1]): cli(command, standalone_mode=False)"
)


def a_terminal() -> tuple[int, int]:
    """A pseudo-terminal of 40 lines and 100 columns: the end to read and write, and a program's."""
    read, end = pty.openpty()
    fcntl.ioctl(end, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 100, 0, 0))
    return read, end


def on_a_terminal(*commands: Sequence[object], typed: Sequence[str] = (), **environment: str):
    """Run commands in one process, with standard output and standard error on terminals.

    Args:
        typed: lines, each of them when there is a new prompt.
        environment: more variables, besides a terminal that knows colours.

    Returns:
        The text of standard output, and that of standard error.
    """
    arguments = json.dumps([[str(word) for word in command] for command in commands])
    variables = {name: value for name, value in os.environ.items() if name != "NO_COLOR"}
    (output, ours), (errors, theirs) = a_terminal(), a_terminal()
    process = subprocess.Popen(
        [sys.executable, "-c", COMMANDS, arguments],
        stdin=ours, stdout=ours, stderr=theirs,
        env=variables | {"TERM": "xterm-256color"} | environment,
    )  # fmt: skip
    os.close(ours), os.close(theirs)
    shown, lines = {output: b"", errors: b""}, [*typed]
    reading = [output, errors]
    while reading:
        for file in select.select(reading, [], [], 60)[0]:
            try:
                part = os.read(file, 1 << 16)
            except OSError:  # Linux's end of a terminal that all have closed
                part = b""
            shown[file] += part
            if not part:
                reading.remove(file)
                os.close(file)
            elif file == output and lines and shown[output].endswith(b"> "):
                os.write(output, lines.pop(0).encode())
    assert process.wait(60) == 0, shown
    return tuple(text.decode(errors="replace") for text in shown.values())
