"""OpenAI's responses: text and calls of tools; nothing is stored."""

from collections.abc import AsyncIterator
from typing import Annotated, Any, Literal

from pydantic import Field

from parscale_core.serve import events, prompt
from parscale_core.serve.api_errors import RequestFailed
from parscale_core.serve.ask import OBJECT, Ask, json_grammar
from parscale_core.serve.fields import (
    Fields,
    Function,
    Generation,
    NamedSchema,
    ObjectFormat,
    Open,
    TextFormat,
)
from parscale_core.serve.tools import Call
from parscale_core.serve.turn import Part, Turn


class InputPart(Open):
    type: Literal["input_text", "output_text", "text"]
    text: str


class InputMessage(Open):
    type: Literal["message"] = "message"
    role: str
    content: str | list[InputPart]


class FunctionCall(Open):
    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str


class FunctionOutput(Open):
    type: Literal["function_call_output"]
    call_id: str
    output: str | list[InputPart]


class SchemaFormat(NamedSchema):
    type: Literal["json_schema"]


class Text(Fields):
    format: (
        Annotated[TextFormat | ObjectFormat | SchemaFormat, Field(discriminator="type")] | None
    ) = None


class FunctionTool(Function):
    type: Literal["function"]


class ResponseRequest(Fields):
    """``POST /v1/responses``."""

    model: str | None = None
    input: str | list[FunctionCall | FunctionOutput | InputMessage]
    instructions: str | None = None
    max_output_tokens: int | None = None
    temperature: float | None = Field(default=None, ge=0, le=100)
    top_p: float = Field(default=1.0, gt=0, le=1)
    stream: bool = False
    text: Text = Text()
    tools: list[FunctionTool] | None = None
    tool_choice: Literal["none", "auto"] = "auto"
    parallel_tool_calls: bool = True
    store: Literal[False] = False
    truncation: Literal["disabled"] = "disabled"
    background: Literal[False] = False
    metadata: dict[str, Any] | None = None
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    service_tier: Literal["auto", "default"] | None = None


def ask(fields: ResponseRequest, tokenizer: Any) -> Ask:
    """What a request asks.

    Raises:
        RequestFailed: the model's template cannot take it.
    """
    given = fields.input
    messages = [{"role": "system", "content": fields.instructions}] if fields.instructions else []
    if isinstance(given, str):
        messages.append({"role": "user", "content": given})
    elif not given:
        raise RequestFailed(
            400, "input must be a text or a list of at least one item", None, "input"
        )
    else:
        messages += [_message(item) for item in given]
    tools = [
        {"type": "function", "function": tool.model_dump(exclude={"type"}, exclude_none=True)}
        for tool in fields.tools or []
    ]
    tools = tools if fields.tool_choice == "auto" else []
    form, grammar = fields.text.format, None
    if isinstance(form, ObjectFormat | SchemaFormat):
        if tools:
            raise RequestFailed(400, "text.format: not together with tools", None, "text")
        schema = OBJECT if isinstance(form, ObjectFormat) else form.schema_
        grammar = json_grammar(schema, "text.format")
    general = Generation(
        model=fields.model,
        max_tokens=fields.max_output_tokens,
        temperature=fields.temperature,
        top_p=fields.top_p,
    )
    ids = prompt.encode_chat(tokenizer, messages, tools=tools or None)
    return Ask(general, [ids], grammar=grammar, limit="max_output_tokens", tools=tools)


def whole(fields: ResponseRequest, turn: Turn, answers: list[Part]) -> dict[str, Any]:
    (answer,) = answers
    output = [_text_item(turn, answer.text, "completed")] if answer.text or not answer.calls else []
    output += [_call_item(call) for call in answer.calls]
    return _response(fields, turn, output, answer.finish_reason)


async def stream(fields: ResponseRequest, turn: Turn) -> AsyncIterator[bytes]:
    sent = 0

    def event(kind: str, **more: Any) -> bytes:
        nonlocal sent
        sent += 1
        return events.named({"type": f"response.{kind}", "sequence_number": sent - 1, **more})

    begun = _response(fields, turn, [], None)
    yield event("created", response=begun)
    yield event("in_progress", response=begun)
    output: list[dict[str, Any]] = []
    text, reason = "", None
    place = {"output_index": 0, "content_index": 0, "item_id": f"msg_{turn.id}"}

    def begin() -> list[bytes]:
        item = _text_item(turn, "", "in_progress") | {"content": []}
        return [
            event("output_item.added", output_index=0, item=item),
            event("content_part.added", **place, part=_text_part("")),
        ]

    def end() -> list[bytes]:
        output.append(_text_item(turn, text, "completed"))
        return [
            event("output_text.done", **place, text=text, logprobs=[]),
            event("content_part.done", **place, part=_text_part(text)),
            event("output_item.done", output_index=0, item=output[0]),
        ]

    calls: list[Call] = []
    async for part in turn.parts():
        reason = part.finish_reason
        calls += part.calls
        if part.text:
            for line in [] if text else begin():
                yield line
            text += part.text
            yield event("output_text.delta", **place, delta=part.text, logprobs=[])
    if not text and not calls:
        for line in begin():
            yield line
    if text or not calls:
        for line in end():
            yield line
    for call in calls:
        item, at = _call_item(call), len(output)
        output.append(item)
        where = {"output_index": at, "item_id": item["id"]}
        empty = item | {"arguments": "", "status": "in_progress"}
        yield event("output_item.added", output_index=at, item=empty)
        yield event("function_call_arguments.delta", **where, delta=call.arguments)
        yield event("function_call_arguments.done", **where, **_said(call))
        yield event("output_item.done", output_index=at, item=item)
    done = _response(fields, turn, output, reason)
    yield event(done["status"], response=done)


def _message(item: FunctionCall | FunctionOutput | InputMessage) -> dict[str, Any]:
    if isinstance(item, FunctionCall):
        function = {"name": item.name, "arguments": item.arguments}
        call = {"id": item.call_id, "type": "function", "function": function}
        return prompt.plain_message({"role": "assistant", "content": "", "tool_calls": [call]})
    if isinstance(item, FunctionOutput):
        text = prompt.text_of(item.output)
        return {"role": "tool", "content": text, "tool_call_id": item.call_id}
    return prompt.plain_message({"role": item.role, "content": prompt.text_of(item.content)})


def _response(
    fields: ResponseRequest, turn: Turn, output: list[dict[str, Any]], reason: str | None
) -> dict[str, Any]:
    is_cut = reason == "length"
    usage = {
        "input_tokens": turn.prompt_tokens,
        "input_tokens_details": {"cached_tokens": turn.cached_tokens},
        "output_tokens": turn.tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": turn.prompt_tokens + turn.tokens,
    }
    given = fields.model_dump(by_alias=True, mode="json")
    echoed = ("instructions", "max_output_tokens", "temperature", "top_p", "tool_choice", "user")
    return {
        "id": f"resp_{turn.id}",
        "object": "response",
        "created_at": turn.created,
        "status": "in_progress" if reason is None else "incomplete" if is_cut else "completed",
        "error": None,
        "incomplete_details": {"reason": "max_output_tokens"} if is_cut else None,
        "model": turn.model,
        "output": output,
        "usage": None if reason is None else usage,
        "previous_response_id": None,
        "store": False,
        "tools": given["tools"] or [],
        "text": {"format": given["text"]["format"] or {"type": "text"}},
        "metadata": fields.metadata or {},
        "parallel_tool_calls": fields.parallel_tool_calls,
        "truncation": "disabled",
        **{name: given[name] for name in echoed},
    }


def _text_item(turn: Turn, text: str, status: str) -> dict[str, Any]:
    content = [_text_part(text)]
    head = {"type": "message", "id": f"msg_{turn.id}", "role": "assistant"}
    return head | {"status": status, "content": content}


def _text_part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _said(call: Call) -> dict[str, str]:
    return {"name": call.name, "arguments": call.arguments}


def _call_item(call: Call) -> dict[str, Any]:
    head = {"type": "function_call", "id": f"fc_{call.id}", "call_id": call.id}
    return head | {"status": "completed", **_said(call)}
