"""One row of a batch: what happens to its logits, and the pieces of its answer."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from parscale_mlx.cache import Cache
from parscale_mlx.engine.mlx_lm_parts import make_logits_processors
from parscale_mlx.model import Model, TransformerBlock

import mlx.core as mx
import numpy as np
from parscale_core.engine import Answer, Sampling
from parscale_core.engine.grammar import GrammarMatcher

NOT_NUMBERS = (
    "the logits are not numbers; most likely a value left the range of the model's type (float16 "
    "ends at 65504): convert the model to bfloat16 or float32"
)


class LogitsAndWeights:
    """A model whose logits have P more columns, the streams' weights: float32 [B, L, vocab + P].

    A batch computes all rows at once and hands each row's logits to its own processors: so each
    row finds its streams' weights where it finds its logits.
    """

    def __init__(self, model: Model):
        self.model = model

    @property
    def layers(self) -> list[TransformerBlock]:
        return self.model.layers

    def __call__(self, inputs: mx.array, cache: list[Cache] | None = None) -> mx.array:
        logits, weights = self.model.logits_and_weights(inputs, cache)
        return mx.concatenate([logits.astype(mx.float32), weights], axis=-1)


@dataclass
class _Told:
    """Of one token: the streams' weights [P], and the model's own logits [vocab]."""

    weights: mx.array | None = None
    logits: mx.array | None = None


class Row:
    """A request in work.

    Args:
        answer: where the pieces go.
        vocab_size: columns of the model's logits.
        streams: P.
        matcher: what the answer must follow.
    """

    def __init__(
        self, answer: Answer, *, vocab_size: int, streams: int, matcher: GrammarMatcher | None
    ):
        self.answer, self.state = answer, answer.state
        self.request = self.state.request
        self.prompt = list(self.request.prompt)
        self.vocab_size, self.streams = vocab_size, streams
        self.matcher, self.error = matcher, ""
        self.failed = False
        # Tokens that come before those that mlx-lm calls the processor with.
        self.before: mx.array | None = None
        self.told: dict[int, _Told] = {}
        # Of a request to several ranks, which rank 0 ends for all: its deadline, and why it ends.
        self.deadline: float | None = None
        self.wish = ""
        self.penalties = _penalties(self.request.sampling)

    def processors(self) -> list[Callable[[mx.array, mx.array], mx.array]]:
        """What mlx-lm calls with the tokens so far and the logits [1, vocab]: one, or none."""
        needed = (
            self.streams > 1
            or self.penalties
            or self.matcher is not None
            or self.request.logprobs is not None
        )
        return [self._process] if needed else []

    def put(
        self, token: int, logprobs: mx.array, stream: mx.Stream, *, drafted: bool = False
    ) -> None:
        """Pass on the answer's next token.

        Args:
            logprobs: [vocab], those that the token was chosen by.
            stream: one that nothing is waiting in, to look at them.
        """
        number = len(self.state.tokens)
        own = self.told.pop(number, _Told())
        with mx.stream(stream):
            chosen: Any = logprobs[token].item()
        if self.error:
            self.fail(ValueError(self.error))
            return
        if not np.isfinite(chosen):
            self.fail(ArithmeticError(NOT_NUMBERS))
            return
        logits = None if own.logits is None else np.array(own.logits)
        weights: Any = None if own.weights is None else own.weights.tolist()
        self.answer.put(self.state.push(token, logits=logits, weights=weights, drafted=drafted))

    def fail(self, error: Exception) -> None:
        self.state.finish_reason = "cancelled"
        self.failed = True
        self.answer.fail(error)

    def interrupted(self) -> bool:
        """End the answer if it is cancelled or its time is over."""
        piece = self.state.interrupt()
        if piece is not None:
            self.answer.put(piece)
        return piece is not None

    @property
    def finished(self) -> bool:
        return self.state.finish_reason is not None

    def _process(self, tokens: mx.array, logits: mx.array) -> mx.array:
        if self.before is not None:
            tokens = mx.concatenate([self.before, tokens])
        number = tokens.shape[0] - len(self.prompt)
        logits = self._note(number, logits)
        for penalty in self.penalties:
            logits = penalty(tokens, logits)
        if self.matcher is not None and not self.error:
            answer: Any = tokens[len(self.prompt) :].tolist()
            try:
                allowed = self.matcher.allowed(answer)
            except ValueError as error:
                # Raised here it would end the answers of the whole batch.
                self.error, allowed = str(error), None
            if allowed is not None:
                logits = mx.where(mx.array(allowed), logits, -mx.inf)
        return logits

    def _note(self, number: int, logits: mx.array) -> mx.array:
        """Keep what is told of a token; returns the logits alone.

        A draft's logits come first, and the model's of the same token take their place.
        """
        own = _Told()
        if logits.shape[-1] > self.vocab_size:
            if self.request.stream_weights:
                own.weights = logits[0, self.vocab_size :]
                mx.async_eval(own.weights)
            logits = logits[:, : self.vocab_size]
        if self.request.logprobs is not None:
            own.logits = logits[0].astype(mx.float32)
            mx.async_eval(own.logits)
        self.told[number] = own
        return logits


def _penalties(sampling: Sampling) -> list[Callable[[mx.array, mx.array], mx.array]]:
    repetition = sampling.repetition_penalty
    return make_logits_processors(
        dict(sampling.logit_bias) or None,
        repetition if repetition != 1 else None,
        sampling.repetition_context,
        sampling.presence_penalty or None,
        sampling.presence_context,
        sampling.frequency_penalty or None,
        sampling.frequency_context,
    )
