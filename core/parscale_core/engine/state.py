"""The state of one request while it is answered; nothing of it is shared with another."""

import time
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any

from parscale_core.engine.detokenize import Detokenizer
from parscale_core.engine.request import FinishReason, Logprob, Piece, Request
from parscale_core.engine.stop import StopStrings

if TYPE_CHECKING:  # the command line imports this package, and its --help must not wait for numpy
    import numpy as np


class RequestState:
    """One row of a batch: its tokens so far, and its text as far as that is final.

    Args:
        request: one that ``parscale_core.engine.check`` let pass.
        tokenizer: a transformers tokenizer.
        end_tokens: ids that end a text. They are never part of it.
        context_length: tokens of prompt and answer together at most.

    Attributes:
        tokens: the answer's tokens, one that ended it included.
        max_tokens: new tokens at most, as the request and the context allow.
        finish_reason: None while the answer goes on.
        cancelled, timed_out: set from any thread to end the answer.
        cached_tokens: set by the engine; the first piece tells it.
    """

    def __init__(
        self,
        request: Request,
        tokenizer: Any,
        end_tokens: Collection[int],
        context_length: int | None = None,
    ):
        self.request = request
        self.end_tokens = end_tokens
        self.tokens: list[int] = []
        self.max_tokens = request.sampling.max_tokens
        if context_length is not None:
            self.max_tokens = min(self.max_tokens, context_length - len(request.prompt))
        self.finish_reason: FinishReason | None = None
        self.cancelled = self.timed_out = False
        self.cached_tokens = 0
        self._detokenizer = Detokenizer(tokenizer)
        self._stop = StopStrings(request.stop)

    def push(
        self,
        token: int,
        *,
        logits: "np.ndarray | None" = None,
        weights: Sequence[float] | None = None,
        drafted: bool = False,
    ) -> Piece:
        """Add the answer's next token; the piece says whether the answer ends with it.

        Args:
            logits: the model's own, [vocabulary], where the request asks for logprobs.
            weights: of the P streams; None for one stream.
        """
        self.tokens.append(token)
        is_end = token in self.end_tokens
        text = "" if is_end else self._stop.push(self._detokenizer.push(token))
        if self._stop.found or (is_end and not self.request.ignore_end):
            self.finish_reason = "stop"
        else:
            self.finish_reason = self._interruption()
            if self.finish_reason is None and len(self.tokens) >= self.max_tokens:
                self.finish_reason = "length"
        logprob: float | None = None
        top: tuple[Logprob, ...] = ()
        if self.request.logprobs is not None and logits is not None:
            from parscale_core.engine.logprobs import told

            logprob, top = told(logits, token, self.request.logprobs)
        return Piece(
            token,
            text + self._rest() if self.finish_reason else text,
            self.finish_reason,
            logprob,
            top,
            tuple(weights or (1.0,)) if self.request.stream_weights else None,
            drafted,
            self.cached_tokens if len(self.tokens) == 1 else 0,
        )

    def interrupt(self) -> Piece | None:
        """A last piece without a token, if the request was cancelled or its time is over.

        For the engine to ask between tokens: while a request waits, and while its prompt is
        computed.
        """
        self.finish_reason = self._interruption()
        return Piece(None, self._rest(), self.finish_reason) if self.finish_reason else None

    def _interruption(self) -> FinishReason | None:
        if self.cancelled:
            return "cancelled"
        deadline = self.request.deadline
        is_late = deadline is not None and time.monotonic() >= deadline
        return "timeout" if self.timed_out or is_late else None

    def _rest(self) -> str:
        if self._stop.found:
            return ""
        text = self._stop.push(self._detokenizer.flush())
        if not self._stop.found:
            return text + self._stop.flush()
        if self.finish_reason == "length":
            self.finish_reason = "stop"
        return text
