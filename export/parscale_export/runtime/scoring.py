"""How likely given texts are."""

from collections.abc import Iterator, Sequence
from itertools import islice

import numpy as np
from parscale_core.engine.logprobs import log_softmax, told

from parscale_export.runtime.decoder import Decoder
from parscale_export.runtime.model import OnnxModel


class ScoredRow:
    """A context and its continuation, whose tokens come one after the other, whatever is likely.

    Attributes:
        score: of the tokens so far, the sum of their log-probabilities.
        is_likeliest: whether each of them was the likeliest.
    """

    greedy = False

    def __init__(self, context: Sequence[int], continuation: Sequence[int]):
        self.tokens, self.continuation = list(context), continuation
        self.end = len(context) + len(continuation)
        self.cached_tokens = 0
        self.score, self.is_likeliest = 0.0, True

    @property
    def finished(self) -> bool:
        return len(self.tokens) == self.end

    def take(self, logits: np.ndarray, weights: np.ndarray | None = None) -> None:
        token = self.continuation[len(self.tokens) - self.end]
        logprob, likeliest = told(logits, token, 1)
        self.score += logprob
        self.is_likeliest = self.is_likeliest and likeliest[0].token == token
        self.tokens.append(token)

    def take_token(self, token: int, weights: np.ndarray | None) -> None:
        raise AssertionError("it asks for logits")

    def fail(self, error: Exception) -> None:
        raise error


def score(
    model: OnnxModel,
    pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
    slots: int,
    kept_bytes: int,
) -> Iterator[tuple[float, bool]]:
    """As ``parscale_core.engine.Engine.score``: several at a time, contexts computed once.

    What is long beside its context is read at once, where the graph gives all logits.
    """
    decoder = Decoder(model, slots, kept_bytes)
    rows = [ScoredRow(*pair) for pair in pairs]
    at_once = [model.all_logits and len(row.continuation) > len(row.tokens) for row in rows]
    stepped = (row for row, alone in zip(rows, at_once, strict=True) if not alone)
    try:
        for row, alone in zip(rows, at_once, strict=True):
            if alone:
                ids = [*row.tokens, *row.continuation[:-1]]
                for logits in model.logits(ids)[len(row.tokens) - 1 :]:
                    model.check_numbers(logits)
                    row.take(logits)
            while not row.finished:
                decoder.waiting.extend(islice(stepped, slots - len(decoder.waiting)))
                decoder.turn()
            yield row.score, row.is_likeliest
    finally:
        decoder.clear()


def token_losses(model: OnnxModel, texts: Sequence[Sequence[int]]) -> list[list[float]]:
    """Cross entropy of each token but the first, in nats, given those before it.

    Raises:
        ValueError: the graph gives the last token's logits only, or has no such token.
    """
    rows = []
    for text in texts:
        logprobs = log_softmax(model.logits(text[:-1]))
        rows.append((-logprobs[np.arange(len(text) - 1), np.asarray(text[1:])]).tolist())
    return rows
