"""KV caches of earlier sequences, kept so that prompts that begin alike are not computed again."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from parscale_export.runtime.blocks import Stored

if TYPE_CHECKING:
    from parscale_export.runtime.model import OnnxModel

LEAST = 32  # tokens below which computing anew costs as little as keeping
# A step of one token costs as much as so many tokens of a prompt. On a CPU, from raw steps of a
# graph at P=4 (33 ms a step, 7.3 ms a token); on a GPU, where prompts are cheaper, an estimate.
STEP_IN_PROMPT_TOKENS = {"cpu": 5, "cuda": 100}


@dataclass(eq=False)
class Entry:
    """A sequence's token ids, and where their entries lie: of a kept one, in their own block."""

    ids: np.ndarray
    stored: Stored


class KeptPrefixes:
    """The most recently used sequences, as many as fit into a number of bytes.

    Args:
        limit: bytes in the device's memory.
    """

    def __init__(self, model: "OnnxModel", limit: int):
        self.model, self.limit = model, limit
        self.entries: list[Entry] = []  # from the least to the most recently used

    def __len__(self) -> int:
        return len(self.entries)

    @property
    def size(self) -> int:
        """Bytes in use."""
        return sum(entry.stored.block.size for entry in [*self.entries])

    def keep(self, tokens: Sequence[int], stored: Stored) -> None:
        """Keep a copy of a sequence's entries; ``tokens`` are those that are in the cache."""
        if stored.length < LEAST or stored.size > self.limit:
            return
        ids = np.array(tokens[: stored.length], np.int64)
        for entry in [*self.entries]:
            shared = common(entry.ids, ids)
            if shared == len(ids):
                self._touch(entry)
                return
            if shared == len(entry.ids):
                self.entries.remove(entry)  # the new one holds all of it
        while self.entries and self.size + stored.size > self.limit:
            del self.entries[0]
        self.entries.append(Entry(ids, stored.copy(stored.length, stored.length)))

    def find(
        self, prompt: Sequence[int], running: Iterable[tuple[Sequence[int], Stored]]
    ) -> tuple[Stored, int] | None:
        """The sequence, kept or running, that saves the most of a prompt, and how many tokens.

        At least one token remains to be computed, whose logits come next.

        Args:
            running: sequences with their tokens.
        """
        if len(prompt) <= LEAST:
            return None
        ids = np.array(prompt[:-1], np.int64)
        found = [*self.entries]
        for tokens, stored in running:
            found.append(Entry(np.array(tokens[: stored.length], np.int64), stored))
        saved, _, best = max(
            ((common(e.ids, ids), -n, e) for n, e in enumerate(found)), default=(0, 0, None)
        )
        if best is None or not self._pays(saved, len(prompt)):
            return None
        if best in self.entries:
            self._touch(best)
        return best.stored, saved

    def _touch(self, entry: Entry) -> None:
        self.entries.remove(entry)
        self.entries.append(entry)

    def _pays(self, saved: int, tokens: int) -> bool:
        if saved < LEAST:
            return False
        if self.model.takes_chunks:
            return True
        # The rest goes token by token, together with the answers on their way.
        return (tokens - saved) * STEP_IN_PROMPT_TOKENS[self.model.device[0]] < tokens


def common(a: np.ndarray, b: np.ndarray) -> int:
    """How many tokens two sequences have in common from their beginnings."""
    shorter = min(len(a), len(b))
    differs = np.flatnonzero(a[:shorter] != b[:shorter])
    return int(differs[0]) if len(differs) else shorter
