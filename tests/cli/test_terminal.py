"""What a terminal shows that a pipe does not: colours, unless they are unwanted, and progress."""

import re
import sys

import pytest

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="pseudo-terminals are POSIX")
COLOUR = re.compile(r"\x1b\[[\d;]*m")


@pytest.fixture
def shown(model, tmp_path):
    """What both outputs show of answers with their streams, a chat, and a conversion."""
    from helpers.terminals import on_a_terminal

    def run(**environment):
        return on_a_terminal(
            ["generate", "--model", model, "-p", "ab", "-n", 3, "--show-streams"],
            ["chat", "--model", model, "-n", 3, "--show-streams"],
            ["convert", model, "-o", tmp_path / "out"],
            typed=["hello\n", "/streams\n", "/streams\n", "/quit\n"],
            **environment,
        )

    return run


@pytest.mark.slow
def test_colours_and_progress_on_a_terminal(shown):
    output, errors = shown()
    assert COLOUR.search(output) and COLOUR.search(errors)
    for words in ("loading the model ...", "reading the prompt ...", "Writing:", "streams hidden"):
        assert words in errors
    assert "stream\tweight" not in output


def test_no_colours_where_they_are_not_wanted(shown):
    output, errors = shown(NO_COLOR="1")
    assert not COLOUR.search(output + errors)
    assert "stream\tweight\ttext" in output
    assert "streams: 1 2 3 4" in errors and "Writing:" in errors


def test_a_dumb_terminal_gets_lines_alone(shown):
    output, errors = shown(TERM="dumb")
    assert "\x1b" not in output + errors
    assert "stream\tweight\ttext" in output
    assert "..." not in errors and "Writing:" not in errors


def test_no_progress_in_a_pipe(parscale, model, tmp_path):
    assert parscale("convert", model, "-o", tmp_path / "out").stderr == ""
