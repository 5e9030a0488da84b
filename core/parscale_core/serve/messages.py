"""Anthropic's messages."""

import json
from collections.abc import AsyncIterator
from typing import Any, Literal

from pydantic import Field

from parscale_core.serve import events, prompt
from parscale_core.serve.api_errors import RequestFailed
from parscale_core.serve.ask import Ask
from parscale_core.serve.fields import Fields, Generation, Open
from parscale_core.serve.tools import Call
from parscale_core.serve.turn import Part, Turn

REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}


class TextBlock(Open):
    type: Literal["text"]
    text: str


class ToolUse(Open):
    type: Literal["tool_use"]
    id: str
    name: str
    input: dict[str, Any]


class ToolResult(Open):
    type: Literal["tool_result"]
    tool_use_id: str
    content: str | list[TextBlock] | None = None


class Message(Fields):
    role: Literal["user", "assistant"]
    content: str | list[TextBlock | ToolUse | ToolResult]


class Tool(Open):
    type: Literal["custom"] | None = None
    name: str = Field(min_length=1)
    description: str | None = None
    input_schema: dict[str, Any]


class ToolChoice(Fields):
    type: Literal["auto", "none"]
    disable_parallel_tool_use: Literal[False] = False


class Thinking(Fields):
    type: Literal["disabled"]


class CountRequest(Fields):
    """``POST /v1/messages/count_tokens``."""

    model: str | None = None
    messages: list[Message] = Field(min_length=1)
    system: str | list[TextBlock] | None = None
    tools: list[Tool] | None = None
    tool_choice: ToolChoice = ToolChoice(type="auto")
    thinking: Thinking | None = None


class MessageRequest(CountRequest):
    """``POST /v1/messages``."""

    max_tokens: int
    stop_sequences: list[str] | None = None
    stream: bool = False
    temperature: float | None = Field(default=None, ge=0, le=100)
    top_p: float = Field(default=1.0, gt=0, le=1)
    top_k: int = Field(default=0, ge=0)
    metadata: dict[str, Any] | None = None
    service_tier: Literal["auto", "standard_only"] | None = None


def ask(fields: MessageRequest, tokenizer: Any) -> Ask:
    """What a request asks.

    Raises:
        RequestFailed: the model's template cannot take it.
    """
    stop = fields.stop_sequences or []
    if len(stop) > 16 or not all(stop):
        wrong = "stop_sequences may be at most 16 texts, none of them empty"
        raise RequestFailed(400, wrong, None, "stop_sequences")
    general = Generation(
        model=fields.model,
        max_tokens=fields.max_tokens,
        temperature=fields.temperature,
        top_p=fields.top_p,
        top_k=fields.top_k,
        stop=stop,
    )
    ids, tools = _prompt(fields, tokenizer)
    return Ask(general, [ids], tools=tools)


def ask_count(fields: CountRequest, tokenizer: Any) -> Ask:
    """As ``ask``, of a request to count."""
    ids, tools = _prompt(fields, tokenizer)
    return Ask(Generation(model=fields.model), [ids], tools=tools)


def count(ask: Ask) -> dict[str, Any]:
    return {"input_tokens": len(ask.prompts[0])}


def _prompt(fields: CountRequest, tokenizer: Any) -> tuple[list[int], list[dict[str, Any]]]:
    """A conversation's tokens, and the tools that it may call."""
    messages = (
        [{"role": "system", "content": prompt.text_of(fields.system)}] if fields.system else []
    )
    for message in fields.messages:
        messages += _plain(message)
    functions = [
        {"name": tool.name, "description": tool.description or "", "parameters": tool.input_schema}
        for tool in fields.tools or []
    ]
    tools = [{"type": "function", "function": function} for function in functions]
    tools = tools if fields.tool_choice.type == "auto" else []
    goes_on = messages[-1]["role"] == "assistant" and "tool_calls" not in messages[-1]
    ids = prompt.encode_chat(tokenizer, messages, tools=tools or None, goes_on=goes_on)
    return ids, tools


def whole(fields: MessageRequest, turn: Turn, answers: list[Part]) -> dict[str, Any]:
    (answer,) = answers
    content = [{"type": "text", "text": answer.text}] if answer.text else []
    content += [_use(call) | {"input": json.loads(call.arguments)} for call in answer.calls]
    return _message(turn) | {
        "content": content,
        **_end(fields, turn, answer),
        "usage": _usage(turn),
    }


async def stream(fields: MessageRequest, turn: Turn) -> AsyncIterator[bytes]:
    yield events.named(
        {"type": "message_start", "message": _message(turn) | {"usage": _usage(turn)}}
    )
    answer, index = Part(0), 0
    is_open = False
    async for part in turn.parts():
        answer.add(part)
        if part.text and not is_open:
            is_open = True
            yield _start(index, {"type": "text", "text": ""})
        if part.text:
            yield _delta(index, {"type": "text_delta", "text": part.text})
        for call in part.calls:
            if is_open:
                yield _stop(index)
                is_open, index = False, index + 1
            yield _start(index, _use(call) | {"input": {}})
            yield _delta(index, {"type": "input_json_delta", "partial_json": call.arguments})
            yield _stop(index)
            index += 1
    if is_open:
        yield _stop(index)
    end = {"delta": _end(fields, turn, answer), "usage": _usage(turn)}
    yield events.named({"type": "message_delta", **end})
    yield events.named({"type": "message_stop"})


def _plain(message: Message) -> list[dict[str, Any]]:
    """One of Anthropic's messages as templates have them: results of tools stand by themselves."""
    if isinstance(message.content, str):
        return [{"role": message.role, "content": message.content}]
    text, calls, found = "", [], []
    for block in message.content:
        if isinstance(block, TextBlock):
            text += block.text
        elif isinstance(block, ToolUse):
            function = {"name": block.name, "arguments": block.input}
            calls.append({"id": block.id, "type": "function", "function": function})
        else:
            result = {"role": "tool", "tool_call_id": block.tool_use_id}
            found.append(result | {"content": prompt.text_of(block.content)})
    if text or calls or not found:
        own: dict[str, Any] = {"role": message.role, "content": text}
        found.append(own | ({"tool_calls": calls} if calls else {}))
    return found


def _message(turn: Turn) -> dict[str, Any]:
    return {
        "id": f"msg_{turn.id}",
        "type": "message",
        "role": "assistant",
        "model": turn.model,
        "content": [],
        "stop_reason": None,
        "stop_sequence": None,
    }


def _end(fields: MessageRequest, turn: Turn, answer: Part) -> dict[str, Any]:
    reason, stop = REASONS[str(answer.finish_reason)], None
    if answer.finish_reason == "stop" and fields.stop_sequences:
        said = turn.said(answer.pieces)
        tokens = [piece.token for piece in said]
        if len(said) == len(answer.pieces):
            # No token ended it, so a text did: the one that comes where the answer was cut.
            full = turn.serving.engine.tokenizer.decode(tokens, skip_special_tokens=False)
            rest = full[len(answer.text) :]
            stop = next((s for s in fields.stop_sequences if rest.startswith(s)), None)
            reason = "stop_sequence"
    return {"stop_reason": reason, "stop_sequence": stop}


def _usage(turn: Turn) -> dict[str, int]:
    return {
        "input_tokens": turn.prompt_tokens - turn.cached_tokens,
        "cache_read_input_tokens": turn.cached_tokens,
        "cache_creation_input_tokens": 0,
        "output_tokens": turn.tokens,
    }


def _use(call: Call) -> dict[str, Any]:
    return {"type": "tool_use", "id": call.id, "name": call.name}


def _start(index: int, block: dict[str, Any]) -> bytes:
    return events.named({"type": "content_block_start", "index": index, "content_block": block})


def _delta(index: int, delta: dict[str, Any]) -> bytes:
    return events.named({"type": "content_block_delta", "index": index, "delta": delta})


def _stop(index: int) -> bytes:
    return events.named({"type": "content_block_stop", "index": index})
