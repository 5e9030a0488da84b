"""Where a stop string ends a text that comes in pieces."""

from collections.abc import Sequence


class StopStrings:
    """Finds the first of several strings in text that comes in pieces.

    Text that may be the beginning of a stop string is held back until it is known not to be.

    Attributes:
        found: a stop string has come; nothing after it counts.
    """

    def __init__(self, strings: Sequence[str]):
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
