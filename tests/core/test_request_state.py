"""The text of an answer: its tokens decoded together, up to a stop string, whatever the pieces."""

import itertools
import time

import pytest
from helpers.byte_tokenizers import BYTES, END, FALLBACK, SCRIPTS, decoded
from hypothesis import given
from hypothesis import strategies as st
from parscale_core.engine import Request, RequestState, Sampling
from parscale_core.engine.detokenize import Detokenizer
from parscale_core.engine.stop import StopStrings


def answered(state: RequestState, tokens: list[int]) -> tuple[str, str | None]:
    text = ""
    for token in tokens:
        piece = state.push(token)
        text += piece.text
        if piece.finish_reason:
            return text, piece.finish_reason
    return text, None


@pytest.mark.parametrize("tokenizer", [BYTES, FALLBACK], ids=["bytes", "fallback"])
@given(data=st.data())
def test_pieces_joined_are_the_tokens_decoded_together(tokenizer, data):
    tokens = data.draw(st.lists(st.integers(0, len(tokenizer) - 1), max_size=40))
    detokenizer = Detokenizer(tokenizer)
    text = "".join([*map(detokenizer.push, tokens), detokenizer.flush()])
    assert text == decoded(tokenizer, tokens)


@given(text=st.text(max_size=60) | st.sampled_from(SCRIPTS))
def test_no_piece_shows_a_part_of_a_character(text):
    detokenizer = Detokenizer(BYTES)
    pieces = [detokenizer.push(n) for n in BYTES.encode(text)]
    assert "".join(pieces) + detokenizer.flush() == text
    assert "\ufffd" in text or not any("\ufffd" in piece for piece in pieces)


def test_an_emoji_comes_whole_and_at_once():
    detokenizer = Detokenizer(BYTES)
    pieces = [detokenizer.push(n) for n in BYTES.encode("a👩b")]
    assert [piece for piece in pieces if piece] == ["a", "👩", "b"]


@given(
    text=st.text("ab\n", max_size=30),
    stops=st.lists(st.text("ab\n", min_size=1, max_size=4), max_size=3),
    data=st.data(),
)
def test_a_stop_string_ends_the_text_however_it_is_cut(text, stops, data):
    cuts = data.draw(st.lists(st.integers(0, len(text)), max_size=8).map(sorted))
    ends = [0, *cuts, len(text)]
    stop, shown = StopStrings(stops), ""
    for begin, end in itertools.pairwise(ends):
        shown += stop.push(text[begin:end])
        assert text.startswith(shown)
        if stop.found:
            break
    shown += "" if stop.found else stop.flush()
    complete = [(text.find(s) + len(s), text.find(s)) for s in stops if s in text]
    assert shown == (text[: min(complete)[1]] if complete else text)
    assert stop.found == bool(complete)


def test_rows_side_by_side_do_not_share_their_text():
    texts = [prefix + text for text in SCRIPTS for prefix in ("", " ", "  ", "中", "👍🏽")][:32]
    rows = [BYTES.encode(text) for text in texts]
    states = [RequestState(Request([1]), BYTES, {END}) for _ in rows]
    shown = [""] * len(rows)
    for step in range(max(map(len, rows)) + 1):
        for n, row in enumerate(rows):
            if step <= len(row):
                shown[n] += states[n].push([*row, END][step]).text
    assert shown == texts
    assert {state.finish_reason for state in states} == {"stop"}


def test_the_first_space_is_kept_and_the_end_token_left_out():
    state = RequestState(Request([1]), BYTES, {END})
    assert answered(state, [*BYTES.encode("   return x"), END]) == ("   return x", "stop")


def test_an_answer_that_goes_on_after_its_end_shows_no_end_token():
    state = RequestState(Request([1], ignore_end=True), BYTES, {END})
    assert answered(state, [*BYTES.encode("a"), END, *BYTES.encode("b")]) == ("ab", None)


@pytest.mark.parametrize(
    ("text", "stop", "shown", "reason"),
    [("one END two", ("END",), "one ", "stop"), ("one E", ("END",), "one E", "length")],
)
def test_a_stop_string_and_what_may_have_become_one(text, stop, shown, reason):
    tokens = BYTES.encode(text)
    request = Request([1], sampling=Sampling(max_tokens=len(tokens)), stop=stop)
    assert answered(RequestState(request, BYTES, {END}), tokens) == (shown, reason)


def test_a_stop_string_within_the_last_bytes_is_a_stop():
    request = Request([1], sampling=Sampling(max_tokens=1), stop=("\ufffd",))
    assert answered(RequestState(request, BYTES, {END}), BYTES.encode("é")) == ("", "stop")


def test_the_context_ends_an_answer():
    state = RequestState(Request([1, 2, 3]), BYTES, {END}, context_length=5)
    assert answered(state, BYTES.encode("abc")) == ("ab", "length")


def test_cancelled_and_out_of_time():
    state = RequestState(Request([1]), BYTES, {END})
    assert state.interrupt() is None
    assert state.push(BYTES.encode("é")[0]).text == ""
    state.cancelled = True
    piece = state.interrupt()
    assert (piece.token, piece.text, piece.finish_reason) == (None, "\ufffd", "cancelled")
    late = RequestState(Request([1], deadline=time.monotonic()), BYTES, {END})
    assert late.push(BYTES.encode("a")[0]).finish_reason == "timeout"
