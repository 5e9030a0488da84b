"""What generation yields, whichever runtime computes it, and where a stop string ends it."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from parscale_cli.sampling import Sampling


@dataclass
class Piece:
    """One generated token and the text that became final with it.

    Attributes:
        prompt: which prompt it answers, counted from 0.
        finish_reason: "stop" or "length" on an answer's last piece, None before.
        streams: the P streams' weights, where they were asked for.
    """

    prompt: int
    text: str
    token: int
    finish_reason: str | None = None
    streams: list[float] | None = None


class Runtime(Protocol):
    """A loaded model, whichever engine runs it.

    Attributes:
        streams: P.
        keep_cache: hold on to the KV cache of one answer for the next, where the engine can.
    """

    tokenizer: Any
    streams: int
    keep_cache: bool

    def require_streams(self) -> None:
        """Raise ValueError where the streams' weights cannot be had."""

    def answer(
        self, prompts: list[list[int]], sampling: Sampling, *, with_streams: bool
    ) -> Iterator[Piece]:
        """Generate for one prompt or for several at once; with streams where they come along."""

    def add_streams(self, prompts: list[list[int]], pieces: Iterator[Piece]) -> Iterator[Piece]:
        """Complete the streams' weights that ``answer`` left out."""

    def peak_memory(self) -> int:
        """Bytes at most so far."""


class StopStrings:
    """Finds the first of several strings in text that comes in pieces.

    Text that may be the beginning of a stop string is held back until it is known not to be.
    """

    def __init__(self, strings: tuple[str, ...]):
        self.strings = [s for s in strings if s]
        self.held = ""
        self.found = False

    def push(self, text: str) -> str:
        """Add text; return what of it, and of what was held back, comes before any stop string."""
        text = self.held + text
        matches = [(start + len(s), start) for s in self.strings if (start := text.find(s)) >= 0]
        if matches:
            # The one that is complete first, so that how the text is cut does not matter.
            self.found, self.held = True, ""
            return text[: min(matches)[1]]
        keep = max((_overlap(text, s) for s in self.strings), default=0)
        self.held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def flush(self) -> str:
        """What was held back, at the end of an answer."""
        text, self.held = self.held, ""
        return text


def _overlap(text: str, stop: str) -> int:
    # The longest end of the text that is a beginning of the stop string.
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
