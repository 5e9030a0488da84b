"""A request in work: what becomes of a step's results, and the pieces of its answer."""

from collections.abc import Sequence

import numpy as np
from parscale_core.engine import Answer
from parscale_core.engine.grammar import GrammarMatcher

from parscale_export.runtime.sampling import choose, generator, takes_likeliest


class RequestRow:
    """One request's tokens, as ``Decoder`` moves them on.

    Args:
        answer: where the pieces go.
        streams: P.
        matcher: what the answer must follow.
        spared: tokens that XTC never leaves out.
    """

    def __init__(
        self, answer: Answer, streams: int, matcher: GrammarMatcher | None, spared: Sequence[int]
    ):
        self.answer, self.state, self.streams = answer, answer.state, streams
        self.request = self.state.request
        self.matcher, self.spared = matcher, spared
        self.tokens = list(self.request.prompt)
        self.random = generator(self.request.sampling.seed)

    @property
    def cached_tokens(self) -> int:
        return self.state.cached_tokens

    @cached_tokens.setter
    def cached_tokens(self, count: int) -> None:
        self.state.cached_tokens = count

    @property
    def finished(self) -> bool:
        return self.state.finish_reason is not None

    @property
    def greedy(self) -> bool:
        """Whether all it asks of logits is their likeliest token."""
        asks_more = self.matcher is not None or self.request.logprobs is not None
        return not asks_more and takes_likeliest(self.request.sampling)

    def interrupt(self) -> None:
        """End the answer if it is cancelled or its time is over."""
        if not self.finished and (piece := self.state.interrupt()) is not None:
            self.answer.put(piece)

    def fail(self, error: Exception) -> None:
        self.state.finish_reason = "cancelled"
        self.answer.fail(error)

    def take(self, logits: np.ndarray, weights: np.ndarray | None) -> None:
        request, allowed = self.request, None
        if self.matcher is not None:
            try:
                allowed = self.matcher.allowed(self.state.tokens)
            except ValueError as error:
                self.fail(error)
                return
        token = choose(
            logits, self.tokens, request.sampling, self.random, allowed=allowed, spared=self.spared
        )
        self._push(token, weights, logits)

    def take_token(self, token: int, weights: np.ndarray | None) -> None:
        self._push(token, weights)

    def _push(
        self, token: int, weights: np.ndarray | None, logits: np.ndarray | None = None
    ) -> None:
        self.tokens.append(token)
        told = None if weights is None else weights.tolist()
        self.answer.put(self.state.push(token, logits=logits, weights=told))
