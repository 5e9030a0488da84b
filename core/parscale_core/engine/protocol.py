"""The engine protocol: one loop a runtime serves every command and the HTTP server."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

from parscale_core.engine.request import Piece, Request


class Handle(Protocol):
    """A request in work. One thread iterates over its pieces; any may cancel it."""

    def __iter__(self) -> Iterator[Piece]:
        """The answer's pieces as they come; the last has a ``finish_reason``.

        Raises:
            ValueError: the request cannot be answered (found before it takes part in a batch).
            ArithmeticError: the logits are not numbers; says the likely reason.
            RuntimeError: the engine failed or was closed.
        """
        ...

    def listen(self, take: Callable[[Piece | Exception], object]) -> None:
        """Instead of iterating: have each piece, or the error that ends the answer, given to
        ``take`` on the engine's thread, which waits for it to return."""
        ...

    def cancel(self) -> None:
        """End the answer at the next token, with "cancelled"; safe after its end."""
        ...


class Engine(Protocol):
    """A loaded model that answers many requests at a time, on a thread of its own.

    Attributes:
        tokenizer: a transformers tokenizer (``encode``, ``decode``, ``apply_chat_template``).
        end_tokens: ids that end a text: the union of all that the model's files say.
        vocab_size: rows of the embedding; greater ids are refused.
        context_length: tokens of prompt and answer together at most; None for no end.
        streams: the P that requests may choose, the default first.
        gives_stream_weights: whether requests may ask for the streams' weights.
        drafts: what a request's ``draft`` may be.
        name: what computes, for people: "MLX on cpu", "onnxruntime CPUExecutionProvider".
    """

    tokenizer: Any
    end_tokens: frozenset[int]
    vocab_size: int
    context_length: int | None
    streams: Sequence[int]
    gives_stream_weights: bool
    drafts: Sequence[int | str]
    name: str

    def submit(self, request: Request) -> Handle:
        """Put a request into the queue, from any thread; returns at once.

        Raises:
            ValueError: it asks for what this engine or model cannot do; the message names the
                field of ``Request`` or ``Sampling`` and what would be right.
            RuntimeError: the engine has failed or is closed.
        """
        ...

    def score(
        self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]], streams: int
    ) -> Iterator[tuple[float, bool]]:
        """How likely given continuations of given contexts are, in their order.

        Computed on the caller's thread, while no request is in work; cheaper where equal contexts
        follow each other.

        Args:
            pairs: token ids of a context and of its continuation, neither empty; together at most
                one more than ``context_length``.
            streams: P.

        Yields:
            The sum of the log-probabilities of a continuation's tokens, in nats, and whether each
            is the likeliest one.
        """
        ...

    def statistics(self) -> Mapping[str, float]:
        """Gauges: requests waiting and running, bytes and entries of kept caches, memory."""
        ...

    def close(self) -> None:
        """End all answers with "cancelled" and give the memory back."""
        ...
