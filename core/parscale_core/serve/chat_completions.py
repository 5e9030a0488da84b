"""OpenAI's chat completions."""

from collections.abc import AsyncIterator
from typing import Annotated, Any, Literal

from pydantic import Field

from parscale_core.serve import choices, prompt
from parscale_core.serve.api_errors import RequestFailed
from parscale_core.serve.ask import OBJECT, Ask, json_grammar
from parscale_core.serve.fields import (
    Fields,
    Generation,
    NamedSchema,
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


class CalledFunction(Open):
    name: str
    arguments: str | dict[str, Any] | None = None


class ToolCall(Open):
    id: str | None = None
    type: Literal["function"] = "function"
    function: CalledFunction


class Message(Open):
    role: str
    content: str | list[TextPart] | None = None
    tool_calls: list[ToolCall] | None = None


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
    form, grammar = fields.response_format, None
    if isinstance(form, ObjectFormat | SchemaFormat):
        if tools:
            message = "response_format: not together with tools, unless tool_choice is none"
            raise RequestFailed(400, message, None, "response_format")
        schema = OBJECT if isinstance(form, ObjectFormat) else form.json_schema.schema_
        grammar = json_grammar(schema, "response_format")
    limit = "max_tokens"
    if fields.max_completion_tokens is not None:
        fields.max_tokens, limit = fields.max_completion_tokens, "max_completion_tokens"
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
        grammar=grammar,
        limit=limit,
        tools=tools,
    )


def whole(fields: ChatRequest, turn: Turn, answers: list[Part]) -> dict[str, Any]:
    made = []
    for answer in answers:
        message: dict[str, Any] = {"role": "assistant", "content": answer.text}
        if answer.calls:
            calls = [_call(call) for call in answer.calls]
            message |= {"content": answer.text or None, "tool_calls": calls}
        made.append({"index": answer.index, "message": message} | _details(fields, turn, answer))
    return choices.whole(turn, _head(turn, "chat.completion"), made)


def stream(fields: ChatRequest, turn: Turn) -> AsyncIterator[bytes]:
    begun: set[int] = set()
    called = [0] * turn.count

    def choice(answer: Part) -> dict[str, Any]:
        index = answer.index
        delta: dict[str, Any] = {} if index in begun else {"role": "assistant"}
        begun.add(index)
        if answer.text or "role" in delta:
            delta["content"] = answer.text
        if answer.calls:
            delta["tool_calls"] = [
                {"index": n} | _call(call) for n, call in enumerate(answer.calls, called[index])
            ]
            called[index] += len(answer.calls)
        return {"index": index, "delta": delta} | _details(fields, turn, answer)

    head = _head(turn, "chat.completion.chunk")
    return choices.stream(turn, head, fields.stream_options, choice)


def _head(turn: Turn, kind: str) -> dict[str, Any]:
    return {"id": f"chatcmpl-{turn.id}", "object": kind}


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
