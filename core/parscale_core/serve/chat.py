"""OpenAI's chat completions."""

from collections.abc import AsyncIterator
from typing import Annotated, Any, Literal

from pydantic import Field

from parscale_core.serve import events, prompt
from parscale_core.serve.ask import Ask
from parscale_core.serve.errors import RequestFailed
from parscale_core.serve.fields import (
    Fields,
    Generation,
    ObjectFormat,
    Open,
    StreamOptions,
    TextFormat,
    Tool,
)
from parscale_core.serve.tools import Call
from parscale_core.serve.turn import Part, Turn


class TextPart(Fields):
    type: Literal["text"]
    text: str


class ToolCall(Open):
    id: str | None = None
    type: Literal["function"] = "function"


class Message(Open):
    role: str
    content: str | list[TextPart] | None = None
    tool_calls: list[ToolCall] | None = None


class NamedSchema(Fields):
    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class SchemaFormat(Fields):
    type: Literal["json_schema"]
    json_schema: NamedSchema


class ChatRequest(Generation):
    """``POST /v1/chat/completions``; OpenAI's fields, mlx-lm's, and ``stream_weights``."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = None
    n: int = Field(default=1, ge=1, le=128)
    logprobs: bool = False
    top_logprobs: int | None = Field(default=None, ge=0, le=20)
    response_format: (
        Annotated[TextFormat | ObjectFormat | SchemaFormat, Field(discriminator="type")] | None
    ) = None
    stream_options: StreamOptions = StreamOptions()
    tools: list[Tool] | None = None
    tool_choice: Literal["none", "auto"] = "auto"
    parallel_tool_calls: bool = True
    chat_template_kwargs: dict[str, Any] | None = None
    role_mapping: dict[str, str] | None = None


def ask(fields: ChatRequest, tokenizer: Any) -> Ask:
    """What a request asks.

    Raises:
        RequestFailed: the model's template cannot take it.
    """
    messages = [prompt.plain_message(m.model_dump(exclude_none=True)) for m in fields.messages]
    tools = [tool.model_dump(exclude_none=True) for tool in fields.tools or []]
    tools = tools if fields.tool_choice == "auto" else []
    schema: dict[str, Any] | None = None
    if isinstance(fields.response_format, ObjectFormat):
        schema = {"type": "object"}
    elif isinstance(fields.response_format, SchemaFormat):
        schema = fields.response_format.json_schema.schema_
    if schema is not None and tools:
        message = "response_format: not together with tools, unless tool_choice is none"
        raise RequestFailed(400, message, None, "response_format")
    if fields.max_completion_tokens is not None:
        fields.max_tokens = fields.max_completion_tokens
    tops = fields.top_logprobs
    ids = prompt.encode_chat(
        tokenizer,
        messages,
        tools=tools or None,
        options=fields.chat_template_kwargs,
        roles=fields.role_mapping,
    )
    return Ask(
        fields,
        [ids],
        n=fields.n,
        logprobs=(tops or 0) if fields.logprobs or tops else None,
        schema=schema,
        tools=tools,
    )


def whole(fields: ChatRequest, turn: Turn, answers: list[Part]) -> dict[str, Any]:
    choices = []
    for answer in answers:
        message: dict[str, Any] = {"role": "assistant", "content": answer.text or None}
        if answer.calls:
            message["tool_calls"] = [_call(call) for call in answer.calls]
        elif answer.text == "":
            message["content"] = ""
        choices.append({"index": answer.index, "message": message} | _details(fields, turn, answer))
    return _head(turn, "chat.completion") | {"choices": choices, "usage": usage(turn)}


async def stream(fields: ChatRequest, turn: Turn) -> AsyncIterator[bytes]:
    head = _head(turn, "chat.completion.chunk")
    if fields.stream_options.include_usage:
        head["usage"] = None
    kept = [Part(index) for index in range(turn.count)]
    roles: set[int] = set()
    calls = [0] * turn.count
    async for part in turn.parts():
        answer = kept[part.index]
        answer.add(part)
        if not (answer.text or answer.calls or answer.finish_reason):
            continue  # a token whose characters are incomplete makes no chunk
        kept[part.index] = Part(part.index)
        delta: dict[str, Any] = {} if part.index in roles else {"role": "assistant"}
        roles.add(part.index)
        if answer.text or "role" in delta:
            delta["content"] = answer.text
        if answer.calls:
            first = calls[part.index]
            calls[part.index] += len(answer.calls)
            delta["tool_calls"] = [
                {"index": first + n} | _call(call) for n, call in enumerate(answer.calls)
            ]
        choice = {"index": part.index, "delta": delta} | _details(fields, turn, answer)
        yield events.data(head | {"choices": [choice]})
    if fields.stream_options.include_usage:
        yield events.data(head | {"choices": [], "usage": usage(turn)})
    yield events.DONE


def usage(turn: Turn) -> dict[str, Any]:
    return {
        "prompt_tokens": turn.prompt_tokens,
        "completion_tokens": turn.tokens,
        "total_tokens": turn.prompt_tokens + turn.tokens,
        "prompt_tokens_details": {"cached_tokens": turn.cached_tokens},
    }


def _head(turn: Turn, kind: str) -> dict[str, Any]:
    return {
        "id": f"chatcmpl-{turn.id}",
        "object": kind,
        "created": turn.created,
        "model": turn.model,
        "system_fingerprint": turn.serving.fingerprint,
    }


def _details(fields: ChatRequest, turn: Turn, answer: Part) -> dict[str, Any]:
    details: dict[str, Any] = {"finish_reason": answer.finish_reason, "logprobs": None}
    vocabulary = turn.serving.vocabulary
    if turn.ask.logprobs is not None:
        details["logprobs"] = vocabulary.logprobs(turn.said(answer.pieces))
    if fields.stream_weights:
        details["parscale_streams"] = vocabulary.streams(answer.pieces)
    return details


def _call(call: Call) -> dict[str, Any]:
    function = {"name": call.name, "arguments": call.arguments}
    return {"id": call.id, "type": "function", "function": function}
