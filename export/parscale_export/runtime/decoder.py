"""One graph at work: prompts wait, are computed, and are decoded together with others."""

from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np
from parscale_core.error_text import one_line

from parscale_export.runtime.blocks import Stored
from parscale_export.runtime.prefill import Growing, compute_together
from parscale_export.runtime.prefixes import KeptPrefixes

if TYPE_CHECKING:
    from parscale_export.runtime.model import OnnxModel

# Tokens of prompts, padding included, that are computed between two steps of running answers. Of
# short prompts, several make one run: their time goes into reading the weights.
TOGETHER = 128


class Row(Protocol):
    """A sequence that takes the results of steps, as the decoder needs to know it.

    Attributes:
        tokens: prompt and answer so far.
        cached_tokens: set by the decoder: tokens of the prompt that were not computed.
        finished: whether it needs no more steps; may become true at any time.
    """

    tokens: list[int]
    cached_tokens: int

    @property
    def finished(self) -> bool: ...

    @property
    def greedy(self) -> bool:
        """Whether all it asks of logits is their likeliest token."""

    def take_token(self, token: int, weights: np.ndarray | None) -> None:
        """Go on with the likeliest token, given the streams' weights [P] if any."""

    def take(self, logits: np.ndarray, weights: np.ndarray | None) -> None:
        """Choose the next token from logits [vocab], given the streams' weights [P] if any."""

    def fail(self, error: Exception) -> None:
        """There is no next token, for this reason."""


class Decoder:
    """Decodes many rows with one model; each call of ``turn`` is a little work for all.

    Args:
        slots: rows to decode together at most.
        kept_bytes: the device's memory for caches of earlier sequences.
    """

    def __init__(self, model: "OnnxModel", slots: int, kept_bytes: int = 0):
        self.model, self.most = model, slots
        self.slots = model.slots(slots)
        self.kept = KeptPrefixes(model, kept_bytes)
        self.waiting: deque[Row] = deque()
        self.running: list[Row] = []  # in the slots' order
        self._filling: tuple[Row, Growing] | None = None

    @property
    def idle(self) -> bool:
        return not (self.waiting or self.running or self._filling)

    @property
    def at_work(self) -> int:
        """Rows whose prompts are computed, wholly or in part."""
        return len(self.running) + (self._filling is not None)

    def turn(self, *, alone: bool = True) -> None:
        """Compute a bounded part of a prompt, if any, and a token of every running row.

        Args:
            alone: nobody else waits for this to end.
        """
        self._let_go()
        if self._filling is not None or (self.waiting and len(self.running) < self.most):
            self._prefill(bounded=not alone or bool(self.running))
        if self.running:
            self._decode()

    def clear(self) -> None:
        """Let all rows go."""
        self.waiting.clear()
        self._filling = None
        while self.running:
            self.running.pop()
            self.slots.remove(len(self.running))

    def _let_go(self) -> None:
        """Free the places of rows that have finished."""
        if any(row.finished for row in self.waiting):
            self.waiting = deque(row for row in self.waiting if not row.finished)
        if self._filling is not None and self._filling[0].finished:
            row, growing = self._filling
            self.kept.keep(row.tokens, growing.stored)
            self._filling = None
        for n in reversed(range(len(self.running))):
            if self.running[n].finished:
                self.kept.keep(self.running[n].tokens, self.slots.sequences[n])
                self.slots.remove(n)
                last = self.running.pop()
                if n < len(self.running):
                    self.running[n] = last

    def _prefill(self, *, bounded: bool) -> None:
        if self._filling is None:
            row = self.waiting.popleft()
            found = self._find(row)
            if found is not None:
                self._reuse(row, *found)
            elif len(row.tokens) >= TOGETHER // 2:
                self._filling = row, Growing(self.model, len(row.tokens))
            else:
                self._compute_together(row)
        if self._filling is not None:
            self._fill(*self._filling, bounded=bounded)

    def _find(self, row: Row) -> tuple[Stored, int] | None:
        running = [row.tokens for row in self.running]
        return self.kept.find(row.tokens, zip(running, self.slots.sequences, strict=True))

    def _reuse(self, row: Row, stored: Stored, tokens: int) -> None:
        row.cached_tokens = tokens
        if self.model.takes_chunks:
            start = stored.copy(tokens, len(row.tokens))
            self._filling = row, Growing(self.model, len(row.tokens), start)
        else:
            self._enter(row, stored.copy(tokens, tokens))

    def _fill(self, row: Row, growing: Growing, *, bounded: bool) -> None:
        """Compute the next part of a prompt; all of it where the operators take no parts."""
        size = len(row.tokens)
        if self.model.takes_chunks:
            size = min(self.model.prefill_chunk, TOGETHER if bounded else size)
        part = row.tokens[growing.length : growing.length + size]
        try:
            results = growing.extend(part)
        except Exception as error:  # onnxruntime's own have no common class; memory, most likely
            self._filling = None
            row.fail(_prompt_failed(error))
            return
        if growing.length == len(row.tokens):
            self._filling = None
            self._take(row, results, 0)
            self._enter(row, growing.stored)

    def _compute_together(self, row: Row) -> None:
        """Compute a short prompt, and others that wait if they are short, too."""
        rows, longest = [row], len(row.tokens)
        while self.waiting and len(self.running) + len(rows) < self.most:
            longest = max(longest, len(self.waiting[0].tokens))
            if longest * (len(rows) + 1) > TOGETHER or self._find(self.waiting[0]) is not None:
                break
            rows.append(self.waiting.popleft())
        try:
            stored, results = compute_together(self.model, [row.tokens for row in rows])
        except Exception as error:
            for row in rows:
                row.fail(_prompt_failed(error))
            return
        for n, row in enumerate(rows):
            self._take(row, results, n)
            self._enter(row, stored[n])

    def _enter(self, row: Row, stored: Stored) -> None:
        self.running.append(row)
        self.slots.add(stored)

    def _decode(self) -> None:
        self._let_go()  # rows may have finished with their first token
        if not self.running:
            return
        fed = [
            row.tokens[stored.length]
            for row, stored in zip(self.running, self.slots.sequences, strict=True)
        ]
        results = self.slots.step(fed, greedy=all(row.greedy for row in self.running))
        for n, row in enumerate(self.running):
            # Else it is in its prompt still, whose rest goes token by token.
            if self.slots.sequences[n].length == len(row.tokens):
                self._take(row, results, n)

    def _take(self, row: Row, results: Sequence[np.ndarray], n: int) -> None:
        first, weights = results[0][n, -1], results[1][n, -1] if len(results) > 1 else None
        is_token = first.dtype == np.int64
        try:
            self.model.check_numbers(np.float32(np.nan if first < 0 else 0) if is_token else first)
        except ArithmeticError as error:
            row.fail(error)
            return
        if is_token:
            row.take_token(int(first), weights)
        else:
            row.take(first, weights)


def _prompt_failed(error: Exception) -> RuntimeError:
    # The running rows' entries are elsewhere, so that they go on.
    return RuntimeError(f"the prompt cannot be computed: {one_line(error)}")
