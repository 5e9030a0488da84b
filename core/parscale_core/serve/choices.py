"""Answers as OpenAI's chat and completions have them: a list of choices."""

from collections.abc import AsyncIterator, Callable
from typing import Any

from parscale_core.serve import events
from parscale_core.serve.fields import StreamOptions
from parscale_core.serve.turn import Part, Turn


def whole(turn: Turn, head: dict[str, Any], choices: list[dict[str, Any]]) -> dict[str, Any]:
    return _identity(turn, head) | {"choices": choices, "usage": _usage(turn)}


async def stream(
    turn: Turn,
    head: dict[str, Any],
    options: StreamOptions,
    choice: Callable[[Part], dict[str, Any]],
) -> AsyncIterator[bytes]:
    """The answers in chunks.

    Args:
        head: the answer's id and what it is.
        choice: what a chunk says of a part; called once for each, in order.
    """
    head = _identity(turn, head)
    if options.include_usage:
        head["usage"] = None
    kept = [Part(index) for index in range(turn.count)]
    async for part in turn.parts():
        answer = kept[part.index]
        answer.add(part)
        if not (answer.text or answer.calls or answer.finish_reason):
            continue  # a token whose characters are incomplete makes no chunk
        kept[part.index] = Part(part.index)
        yield events.data(head | {"choices": [choice(answer)]})
    if options.include_usage:
        yield events.data(head | {"choices": [], "usage": _usage(turn)})
    yield events.DONE


def _usage(turn: Turn) -> dict[str, Any]:
    return {
        "prompt_tokens": turn.prompt_tokens,
        "completion_tokens": turn.tokens,
        "total_tokens": turn.prompt_tokens + turn.tokens,
        "prompt_tokens_details": {"cached_tokens": turn.cached_tokens},
    }


def _identity(turn: Turn, head: dict[str, Any]) -> dict[str, Any]:
    more = {"created": turn.created, "model": turn.model}
    return head | more | {"system_fingerprint": turn.serving.fingerprint}
