"""Printing answers: plain text as it comes, tinted by stream, or JSON."""

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass

import click

from parscale_cli.answer import Piece

# Eight hues of the 256-colour palette that read well on light and dark backgrounds.
COLOURS = (33, 166, 64, 125, 37, 136, 61, 160)


@dataclass
class Stats:
    """Counts and times of one run: seconds, and bytes of memory."""

    prompt_tokens: int
    generation_tokens: int = 0
    time_to_first_token: float = 0.0
    generation_seconds: float = 0.0
    peak_memory: int = 0

    def watch(self, pieces: Iterator[Piece]) -> Iterator[Piece]:
        """Pass pieces on, counting and timing them."""
        start = time.perf_counter()
        for piece in pieces:
            now = time.perf_counter()
            self.generation_tokens += 1
            if self.generation_tokens == 1:
                self.time_to_first_token = now - start
            self.generation_seconds = now - start - self.time_to_first_token
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


def loudest(weights: list[float]) -> int:
    """The stream with the largest weight, counted from 1."""
    return max(range(len(weights)), key=weights.__getitem__) + 1


def tint(text: str, stream: int) -> str:
    """Text in its stream's colour."""
    return click.style(text, fg=COLOURS[(stream - 1) % len(COLOURS)])


def legend(streams: int) -> str:
    """One line that says which colour is which stream."""
    return "streams: " + " ".join(tint(str(n), n) for n in range(1, streams + 1))


def print_text(pieces: Iterator[Piece], *, many: int) -> None:
    """Print answers: a single one as it comes, several each under a heading when it is whole."""
    texts: dict[int, str] = {}
    for piece in pieces:
        if many == 1:
            click.echo(piece.text, nl=False)
            continue
        texts[piece.prompt] = texts.get(piece.prompt, "") + piece.text
        if piece.finish_reason:
            click.echo(f"==> {piece.prompt + 1} of {many}\n{texts[piece.prompt]}\n")
    if many == 1:
        click.echo()


def print_streams(pieces: Iterator[Piece], decode, *, colour: bool) -> None:
    """Print which stream spoke loudest for each token.

    In colour, the text tinted by stream; otherwise a line a token: stream, weight, token as JSON.
    """
    announced = False
    for piece in pieces:
        assert piece.streams is not None
        stream = loudest(piece.streams)
        if not colour:
            token = json.dumps(decode([piece.token]), ensure_ascii=False)
            click.echo(f"{stream}\t{piece.streams[stream - 1]:.3f}\t{token}")
            continue
        if not announced:
            click.echo(legend(len(piece.streams)), err=True)
            announced = True
        click.echo(tint(piece.text, stream), nl=False, color=True)
    if colour:
        click.echo()


def collect_json(pieces: Iterator[Piece], prompts: list, decode) -> list[dict]:
    """Gather answers for a machine, in the prompts' order; with streams, a column for each."""
    answers: list[dict] = [
        {"prompt": prompt, "text": "", "finish_reason": None, "tokens": []} for prompt in prompts
    ]
    for piece in pieces:
        answer = answers[piece.prompt]
        answer["text"] += piece.text
        answer["finish_reason"] = piece.finish_reason
        token = {"id": piece.token, "text": decode([piece.token])}
        for n, weight in enumerate(piece.streams or [], 1):
            token[f"stream_{n}"] = round(weight, 6)
        answer["tokens"].append(token)
    return answers
