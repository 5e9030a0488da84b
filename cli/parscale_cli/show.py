"""Printing answers: plain text as it comes, tinted by stream, or JSON."""

import json
import os
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import click
from parscale_core.engine import Piece

# Eight hues of the 256-colour palette that read well on light and dark backgrounds.
COLOURS = (33, 166, 64, 125, 37, 136, 61, 160)


def in_colour() -> bool:
    """Whether standard output is a terminal that is to show colours (https://no-color.org)."""
    return sys.stdout.isatty() and "NO_COLOR" not in os.environ and os.environ.get("TERM") != "dumb"


@contextmanager
def waiting(what: str, *, shown: bool = True) -> Iterator[None]:
    """Say on a terminal's standard error what takes its time, until the block ends."""
    shown = shown and sys.stderr.isatty() and os.environ.get("TERM") != "dumb"
    if shown:
        click.echo(f"{what} ...", nl=False, err=True)
    try:
        yield
    finally:
        if shown:
            click.echo(f"\r{' ' * len(what)}    \r", nl=False, err=True)


def after_the_first(pieces: Iterator[Piece], *, shown: bool) -> Iterator[Piece]:
    """The pieces of an answer, with a word on standard error until the first one comes."""
    with waiting("reading the prompt", shown=shown):
        first = next(pieces, None)
    if first is not None:
        yield first
        yield from pieces


@dataclass
class Stats:
    """Counts and times of one run: seconds, and bytes of memory."""

    prompt_tokens: int
    generation_tokens: int = 0
    time_to_first_token: float = 0.0
    generation_seconds: float = 0.0
    peak_memory: int = 0
    start: float = field(default_factory=time.perf_counter)

    def watch(self, pieces: Iterable[Piece]) -> Iterator[Piece]:
        """Pass the pieces of one answer on, counting and timing them.

        Times are counted from when this was made: answers of one batch are watched one after the
        other.
        """
        for piece in pieces:
            now = time.perf_counter() - self.start
            self.generation_tokens += piece.token is not None
            self.time_to_first_token = self.time_to_first_token or now
            self.generation_seconds = now - self.time_to_first_token
            yield piece

    def as_dict(self) -> dict:
        prompt_tps = self.prompt_tokens / max(self.time_to_first_token, 1e-9)
        # The first token came with the prompt: its time is not generation's.
        generation_tps = (self.generation_tokens - 1) / max(self.generation_seconds, 1e-9)
        return {
            "prompt_tokens": self.prompt_tokens,
            "prompt_tps": round(prompt_tps, 3),
            "generation_tokens": self.generation_tokens,
            "generation_tps": round(max(generation_tps, 0), 3),
            "time_to_first_token": round(self.time_to_first_token, 4),
            "peak_memory": self.peak_memory,
        }

    def print(self) -> None:
        values = self.as_dict()
        click.echo(
            f"Prompt: {values['prompt_tokens']} tokens, "
            f"{values['prompt_tps']:.1f} tokens per second\n"
            f"Generation: {values['generation_tokens']} tokens, "
            f"{values['generation_tps']:.1f} tokens per second\n"
            f"Time to first token: {self.time_to_first_token:.3f} s\n"
            f"Peak memory: {self.peak_memory / 1e9:.3f} GB",
            err=True,
        )


def peak_memory(engine: Any) -> int:
    """Bytes at most so far: what the engine counts, or all of the process's in the host."""
    if "peak_bytes" in (statistics := engine.statistics()):
        return int(statistics["peak_bytes"])
    if sys.platform == "win32":
        import psutil

        return psutil.Process().memory_info().peak_wset
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def largest(weights: Sequence[float]) -> int:
    """The stream with the largest weight, counted from 1."""
    return max(range(len(weights)), key=weights.__getitem__) + 1


def tint(text: str, stream: int) -> str:
    """Text in its stream's colour."""
    return click.style(text, fg=COLOURS[(stream - 1) % len(COLOURS)])


def legend(streams: int) -> str:
    """One line that says which colour is which stream, where there are colours."""
    numbers = map(str, range(1, streams + 1))
    return "streams: " + " ".join(tint(n, int(n)) if in_colour() else n for n in numbers)


def print_text(answers: list[Iterator[Piece]], beginnings: list[str]) -> None:
    """Print answers: a single one as it comes, several each under a heading when it is whole.

    Args:
        beginnings: what is printed before each.
    """
    if len(answers) == 1:
        click.echo(beginnings[0], nl=False)
        for piece in answers[0]:
            click.echo(piece.text, nl=False)
        click.echo()
        return
    for number, (pieces, beginning) in enumerate(zip(answers, beginnings, strict=True), 1):
        text = beginning + "".join(piece.text for piece in pieces)
        click.echo(f"==> {number} of {len(answers)}\n{text}\n")


def print_streams(pieces: Iterator[Piece], *, colour: bool) -> None:
    """Print the stream with the largest weight for each token.

    In colour, the text tinted by stream; otherwise a line a token under a heading: stream, weight,
    text as JSON.
    """
    announced = False
    if not colour:
        click.echo("stream\tweight\ttext")
    for piece in pieces:
        weights = piece.stream_weights
        if weights is None:
            continue
        stream = largest(weights)
        if not colour:
            text = json.dumps(piece.text, ensure_ascii=False)
            click.echo(f"{stream}\t{weights[stream - 1]:.3f}\t{text}")
            continue
        if not announced:
            click.echo(legend(len(weights)), err=True)
            announced = True
        click.echo(tint(piece.text, stream), nl=False, color=True)
    if colour:
        click.echo()


def collect_json(pieces: Iterator[Piece], prompt: Any) -> dict[str, Any]:
    """Gather an answer for a machine; the tokens' texts joined are its text.

    Where streams' weights come along, each token has a column for each.
    """
    answer: dict[str, Any] = {"prompt": prompt, "text": "", "finish_reason": None, "tokens": []}
    for piece in pieces:
        answer["text"] += piece.text
        answer["finish_reason"] = piece.finish_reason
        token: dict[str, Any] = {"id": piece.token, "text": piece.text}
        for n, weight in enumerate(piece.stream_weights or [], 1):
            token[f"stream_{n}"] = round(weight, 6)
        answer["tokens"].append(token)
    return answer
