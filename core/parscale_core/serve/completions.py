"""OpenAI's completions of raw text."""

from collections.abc import AsyncIterator
from typing import Annotated, Any, Literal

from pydantic import Field

from parscale_core.serve import choices, prompt
from parscale_core.serve.ask import Ask
from parscale_core.serve.fields import Generation, StreamOptions
from parscale_core.serve.turn import Part, Turn


class CompletionRequest(Generation):
    """``POST /v1/completions``: one prompt or several, of text or of token ids."""

    prompt: str | list[str] | list[int] | list[list[int]]
    n: int = Field(default=1, ge=1, le=128)
    best_of: Literal[1] = 1
    logprobs: bool | Annotated[int, Field(ge=0, le=20)] | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=20)
    echo: Literal[False] = False
    suffix: Literal[""] = ""
    stream_options: StreamOptions = StreamOptions()

    @property
    def tops(self) -> int | None:
        """How many likeliest tokens to tell: OpenAI has a number, mlx-lm chat's two fields."""
        if self.logprobs is None or isinstance(self.logprobs, bool):
            return (self.top_logprobs or 0) if self.logprobs or self.top_logprobs else None
        return self.logprobs


def ask(fields: CompletionRequest, tokenizer: Any) -> Ask:
    """What a request asks.

    Raises:
        RequestFailed: a prompt cannot be made into tokens.
    """
    given: Any = fields.prompt
    if isinstance(given, str) or not given or isinstance(given[0], int):
        given = [given]
    prompts = [prompt.encode_text(tokenizer, p) if isinstance(p, str) else p for p in given]
    return Ask(fields, prompts, n=fields.n, logprobs=fields.tops)


def whole(fields: CompletionRequest, turn: Turn, answers: list[Part]) -> dict[str, Any]:
    made = [_choice(fields, turn, answer, 0) for answer in answers]
    return choices.whole(turn, _head(turn), made)


def stream(fields: CompletionRequest, turn: Turn) -> AsyncIterator[bytes]:
    lengths = [0] * turn.count

    def choice(answer: Part) -> dict[str, Any]:
        lengths[answer.index] += len(answer.text)
        offset = lengths[answer.index] - len(answer.text)
        return _choice(fields, turn, answer, offset)

    return choices.stream(turn, _head(turn), fields.stream_options, choice)


def _head(turn: Turn) -> dict[str, Any]:
    return {"id": f"cmpl-{turn.id}", "object": "text_completion"}


def _choice(fields: CompletionRequest, turn: Turn, answer: Part, offset: int) -> dict[str, Any]:
    choice: dict[str, Any] = {
        "index": answer.index,
        "text": answer.text,
        "finish_reason": answer.finish_reason,
        "logprobs": None,
    }
    vocabulary, said = turn.serving.vocabulary, turn.said(answer.pieces)
    if fields.tops is not None and isinstance(fields.logprobs, int) and fields.logprobs is not True:
        choice["logprobs"] = vocabulary.old_logprobs(said, offset)
    elif fields.tops is not None:
        choice["logprobs"] = vocabulary.logprobs(said)
    if fields.stream_weights:
        choice["parscale_streams"] = vocabulary.streams(answer.pieces)
    return choice
