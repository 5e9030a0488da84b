"""From what a client sent to token ids."""

import inspect
import json
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from parscale_core.error_text import one_line
from parscale_core.serve.api_errors import RequestFailed

# For models without a chat template, as mlx-lm's server has it.
ROLES = {
    "system_prompt": "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant follows the given rules no matter what.",
    "system": "ASSISTANT's RULE: ",
    "user": "USER: ",
    "assistant": "ASSISTANT: ",
    "stop": "\n",
}


def text_of(content: Any) -> str:
    """A message's content as one text: null is none, parts are joined."""
    if content is None or isinstance(content, str):
        return content or ""
    return "".join(part["text"] if isinstance(part, dict) else part.text for part in content)


def plain_message(message: dict[str, Any]) -> dict[str, Any]:
    """A message as templates take it: one text, calls with their arguments as objects."""
    message = {key: value for key, value in message.items() if value is not None}
    role = message["role"]
    message |= {"role": "system" if role == "developer" else role}
    message["content"] = text_of(message.get("content"))
    if "tool_calls" in message:
        message["tool_calls"] = [_plain_call(call) for call in message["tool_calls"]]
    return message


def _plain_call(call: dict[str, Any]) -> dict[str, Any]:
    function = dict(call["function"])
    # What is no JSON stays text.
    with suppress(TypeError, ValueError):
        function["arguments"] = json.loads(function.get("arguments") or "{}")
    return call | {"function": function}


def encode_text(tokenizer: Any, text: str) -> list[int]:
    """A raw prompt's tokens.

    Raises:
        RequestFailed: it cannot be made into tokens.
    """
    try:
        return list(tokenizer.encode(text))
    except Exception as error:  # the tokenizers library raises what it likes
        raise _failed(error) from error


def encode_chat(
    tokenizer: Any,
    messages: Sequence[dict[str, Any]],
    *,
    tools: list[dict[str, Any]] | None = None,
    options: dict[str, Any] | None = None,
    roles: dict[str, str] | None = None,
    goes_on: bool = False,
) -> list[int]:
    """A conversation's tokens, by the model's chat template.

    Args:
        tools: for the template.
        options: more of what the template may use.
        roles: what stands before each role's messages, for models without a template.
        goes_on: the answer continues the last message.

    Raises:
        RequestFailed: the template cannot take it, or it cannot be made into tokens.
    """
    if not tokenizer.chat_template:
        if tools:
            raise RequestFailed(400, "tools: this model has no chat template", None, "tools")
        return encode_text(tokenizer, _without_template(messages, ROLES | (roles or {})))
    own = inspect.signature(tokenizer.apply_chat_template).parameters
    for name in options or {}:
        # What a template is given is the request's, what template it is and how it is read is not.
        if name in own:
            message = f"chat_template_kwargs: {name} is not a request's to set"
            raise RequestFailed(400, message, None, "chat_template_kwargs")

    conversation = _with_names(messages)

    def render(tools: list[dict[str, Any]] | None) -> str:
        return tokenizer.apply_chat_template(
            conversation,
            tools=tools,
            tokenize=False,
            add_generation_prompt=not goes_on,
            continue_final_message=goes_on,
            **(options or {}),
        )

    try:
        text = render(tools)
        if tools and text == render(None):
            raise RequestFailed(
                400, "tools: this model's chat template has no place for them", None, "tools"
            )
        return list(tokenizer.encode(text, add_special_tokens=False))
    except RequestFailed:
        raise
    except Exception as error:  # templates and the tokenizers library raise what they like
        raise _failed(error) from error


def _with_names(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Results of tools with the names of the tools, which some templates want (Hermes')."""
    calls = [call for message in messages for call in message.get("tool_calls") or []]
    names = {call.get("id"): call["function"]["name"] for call in calls}

    def named(message: dict[str, Any]) -> dict[str, Any]:
        of = message.get("tool_call_id")
        is_known = message["role"] == "tool" and isinstance(of, str) and of in names
        return {"name": names[of]} | message if is_known else message

    return [named(message) for message in messages]


def _without_template(messages: Sequence[dict[str, Any]], roles: dict[str, str]) -> str:
    lines = [roles["system_prompt"]] if roles["system_prompt"] else []
    lines += [
        roles.get(message["role"], "") + message["content"] + roles["stop"] for message in messages
    ]
    return "".join(lines) + roles["assistant"].rstrip()


def _failed(error: Exception) -> RequestFailed:
    return RequestFailed(400, f"the prompt cannot be made into tokens: {one_line(error)}")
