"""Every failure is one line that names the file or the option, and never a traceback."""

import errno
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import click
from parscale_core.error_text import one_line

DEBUG = "PARSCALE_DEBUG"
# What the packages raise of bad input, with a message for people. Other classes are named.
SAID = (OSError, ValueError, ArithmeticError, ImportError, RuntimeError)
# Libraries write force=True and streams=4, as their callers do, or a field between backquotes.
FIELD = re.compile(r"`([a-z][a-z_0-9]*)(?:=([^`]*))?`|\b([a-z][a-z_0-9]*)=((?:True|False)\b)?")


@contextmanager
def one_line_errors(parameters: Sequence[click.Parameter] = ()) -> Iterator[None]:
    """Turn exceptions into Click's, whose message is one line.

    Args:
        parameters: of the command that runs; fields of their names are written as its options.
    """
    try:
        yield
    # Click's own errors and control flow, and a closed pipe, are Click's to handle.
    except (click.ClickException, click.exceptions.Exit, click.Abort):
        raise
    except Exception as error:
        if os.environ.get(DEBUG) or getattr(error, "errno", None) == errno.EPIPE:
            raise
        raise click.ClickException(explain(error, parameters)) from error


def explain(error: Exception, parameters: Sequence[click.Parameter] = ()) -> str:
    """What a person reads of an error: the file and the cause, with options as they are typed."""
    text = one_line(error, most=None)
    if isinstance(error, OSError) and error.strerror:
        named = "" if error.filename is None else f"{error.filename}: "
        text = named + error.strerror.lower()
    elif isinstance(error, MemoryError):
        text = f"not enough memory{f' ({text})' if str(error) else ''}"
    elif isinstance(error, UnicodeError) and type(error) is not UnicodeError:
        text = f"not text in UTF-8 ({text})"
    elif not str(error).strip():
        text = f"{type(error).__name__} ({DEBUG}=1 shows where)"
    elif not isinstance(error, SAID):
        text = f"{type(error).__name__}: {text} ({DEBUG}=1 shows where)"
    return with_dashes(text, parameters)


def with_dashes(text: str, parameters: Sequence[click.Parameter]) -> str:
    """A library's message with its fields as a command's options: --force for force=True."""
    options = {p.name: max(p.opts, key=len) for p in parameters if isinstance(p, click.Option)}

    def typed(match: re.Match) -> str:
        quoted, value, name, flag = match.groups()
        if (quoted or name) not in options:
            return match[0]
        if quoted:
            return options[quoted] + (f" {value}" if value else "")
        return options[name] + ("" if flag else " ")

    return FIELD.sub(typed, text)
