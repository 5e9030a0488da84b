"""Stop strings in text that comes in pieces."""

import pytest
from parscale_cli.answer import StopStrings


def run(strings, pieces):
    stop = StopStrings(strings)
    shown = ""
    for piece in pieces:
        shown += stop.push(piece)
        if stop.found:
            return shown, True
    return shown + stop.flush(), False


@pytest.mark.parametrize(
    ("strings", "text", "shown"),
    [
        (("END",), "one END two", "one "),
        (("END",), "one EN", "one EN"),
        (("END", "N"), "one END", "one E"),
        (("one", "on"), "one", ""),
        (("aab",), "aaab", "a"),
        ((), "anything", "anything"),
        (("",), "anything", "anything"),
        (("\n\n",), "a\nb\n\nc", "a\nb"),
    ],
)
def test_every_way_of_cutting_the_text(strings, text, shown):
    for size in range(1, len(text) + 1):
        pieces = [text[i : i + size] for i in range(0, len(text), size)]
        assert run(strings, pieces) == (shown, shown != text)


def test_nothing_that_may_begin_a_stop_string_is_shown_early():
    stop = StopStrings(("<end>",))
    assert stop.push("text <e") == "text "
    assert stop.push("x") == "<ex"
