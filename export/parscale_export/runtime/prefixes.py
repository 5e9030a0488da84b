"""KV caches of earlier sequences, kept so that prompts that begin alike are not computed again."""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from parscale_export.runtime.blocks import Stored

if TYPE_CHECKING:
    from parscale_export.runtime.model import OnnxModel

LEAST = 32  # tokens below which computing anew costs as little as keeping
# A step of one token costs as much as so many tokens of a prompt. On a CPU: measured with
# benchmarks/slots_onnx.py; on a GPU, where prompts are far cheaper, an estimate.
STEP_IN_PROMPT_TOKENS = {"cpu": 5, "cuda": 100}


class KeptPrefixes:
    """The most recently used sequences, as many as fit into a number of bytes.

    Args:
        limit: bytes in the device's memory.
    """

    def __init__(self, model: "OnnxModel", limit: int):
        self.model, self.limit = model, limit
        # From the least to the most recently used; a stored sequence has a block of its own.
        self.entries: list[tuple[np.ndarray, Stored]] = []

    def __len__(self) -> int:
        return len(self.entries)

    @property
    def size(self) -> int:
        """Bytes in use."""
        return sum(stored.block.size for _, stored in [*self.entries])

    def keep(self, tokens: Sequence[int], stored: Stored) -> None:
        """Keep a copy of a sequence's entries; ``tokens`` are those that are in the cache."""
        ids = np.array(tokens[: stored.length], np.int64)
        if stored.length < LEAST or self.limit <= 0:
            return
        rest = []
        for entry in self.entries:
            if common(entry[0], ids) == len(ids):
                # It is part of what is there.
                self.entries.remove(entry)
                self.entries.append(entry)
                return
            if common(entry[0], ids) < len(entry[0]):
                rest.append(entry)
        self.entries = [*rest, (ids, stored.copy(stored.length, stored.length))]
        while self.entries and self.size > self.limit:
            del self.entries[0]

    def find(
        self, prompt: Sequence[int], running: Iterable[tuple[Sequence[int], Stored]]
    ) -> tuple[Stored, int] | None:
        """The sequence, kept or running, that saves the most of a prompt, and how many tokens.

        At least one token remains to be computed, whose logits come next.

        Args:
            running: sequences with their tokens.
        """
        ids = np.array(prompt[:-1], np.int64)
        best: tuple[Stored, int] | None = None
        found = None
        for entry in self.entries:
            n = common(entry[0], ids)
            if best is None or n > best[1]:
                best, found = (entry[1], n), entry
        for tokens, stored in running:
            n = min(common(np.array(tokens, np.int64), ids), stored.length)
            if best is None or n > best[1]:
                best, found = (stored, n), None
        if best is None or not self._pays(best[1], len(prompt)):
            return None
        if found is not None:
            self.entries.remove(found)
            self.entries.append(found)
        return best

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
