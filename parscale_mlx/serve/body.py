"""Check what a request asks for, before mlx-lm's handler and its generation thread see it.

mlx-lm checks types and some ranges. What else would end its generation thread, or make it fetch
something, is refused here, and so is what would silently be ignored but changes the answer.
"""

import inspect
import json
import math
from typing import Any

from parscale_mlx.serve.failure import RequestFailed
from parscale_mlx.serve.models import ServedModels

from transformers import PreTrainedTokenizerBase

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
PATHS = {CHAT: CHAT, "/chat/completions": CHAT, TEXT: TEXT}
MAX_DRAFT_TOKENS = 64
NUMBERS: dict[str, tuple[float, float]] = {
    "temperature": (0, 100),
    "top_p": (0, 1),
    "min_p": (0, 1),
    "repetition_penalty": (0, 100),
    "presence_penalty": (-100, 100),
    "frequency_penalty": (-100, 100),
    "xtc_probability": (0, 1),
    "xtc_threshold": (0, 0.5),
}
PENALTIES = ("repetition_penalty", "presence_penalty", "frequency_penalty")
INTEGERS: dict[str, tuple[int, int]] = {
    "top_logprobs": (0, 11),
    "repetition_context_size": (0, 1 << 20),
    "presence_context_size": (0, 1 << 20),
    "frequency_context_size": (0, 1 << 20),
    "seed": (0, (1 << 63) - 1),
    "num_draft_tokens": (0, MAX_DRAFT_TOKENS),
}
# Fields of which only one value is served.
ONLY: dict[str, Any] = {
    "n": 1,
    "best_of": 1,
    "echo": False,
    "suffix": "",
    "adapters": None,
    "response_format": {"type": "text"},
}
# What a template is given is the request's, what template it is and how it is read is not.
TEMPLATE_OPTIONS = set(inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters)
MAX_STOPS = 16


def parse(raw: bytes) -> dict[str, Any]:
    """A request's body; fields that are null are left out.

    Raises:
        RequestFailed: it is not a JSON object.
    """
    try:
        body = json.loads(raw.decode("utf-8"), parse_constant=_refuse, parse_float=_finite)
    except (ValueError, RecursionError) as error:
        raise RequestFailed(400, f"Invalid JSON in request body: {str(error)[:200]}") from error
    if not isinstance(body, dict):
        raise RequestFailed(400, "Request should be a JSON dictionary")
    return {key: value for key, value in body.items() if value is not None}


def check(body: dict[str, Any], path: str, models: ServedModels) -> dict[str, Any]:
    """A request as mlx-lm's handler takes it.

    Args:
        body: from ``parse``.
        path: ``CHAT`` or ``TEXT``.

    Raises:
        RequestFailed: a field is not what it should be; the message names it.
    """
    body = dict(body)
    body["model"] = models.resolve(_typed(body, "model", str, "a string"))
    for name, value in ONLY.items():
        if body.pop(name, value) != value:
            raise RequestFailed(400, f"{name} is not supported here, but as {json.dumps(value)}")
    for name, (least, most) in NUMBERS.items():
        if name in body:
            body[name] = float(_number(body, name, least, most))
    limits = INTEGERS | {
        "top_k": (0, models.vocabulary - 1),
        "max_tokens": (1, models.settings.max_tokens),
        "max_completion_tokens": (1, models.settings.max_tokens),
    }
    for name, (least, most) in limits.items():
        if name in body:
            _integer(body, name, least, most)
    body["draft_model"] = _draft(body, models)
    for name in ("stream", "stream_weights"):
        body[name] = _typed(body, name, bool, "true or false") or False
    if "seed" in body and models.parallel is not None:
        raise RequestFailed(400, "seed is not supported by a model that several processes share")
    body["stop"] = _stop(body.get("stop", []))
    body["logit_bias"] = _logit_bias(body.get("logit_bias"), models.vocabulary)
    options = _typed(body, "stream_options", dict, "an object") or {}
    body["stream_options"] = {"include_usage": options.get("include_usage") is True}
    return _chat(body) if path == CHAT else _text(body, models.vocabulary)


def _draft(body: dict[str, Any], models: ServedModels) -> str | None:
    draft = models.resolve_draft(_typed(body, "draft_model", str, "a string"), body["model"])
    # mlx-lm's penalties do not see the prompt where it decodes speculatively.
    if body.get("num_draft_tokens") == 0 or any(body.get(name) for name in PENALTIES):
        return None
    return draft


def _chat(body: dict[str, Any]) -> dict[str, Any]:
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise RequestFailed(400, "messages must be a list of at least one message")
    for message in messages:
        _message(message)
    tools = body.get("tools", [])
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise RequestFailed(400, "tools must be a list of objects")
    roles = _typed(body, "role_mapping", dict, "an object") or {}
    if not all(isinstance(text, str) for text in roles.values()):
        raise RequestFailed(400, "role_mapping must be an object of strings")
    template = _typed(body, "chat_template_kwargs", dict, "an object") or {}
    for name in template:
        if name in TEMPLATE_OPTIONS:
            raise RequestFailed(400, f"chat_template_kwargs: {name} is not a request's to set")
    _typed(body, "logprobs", bool, "true or false")
    return body


def _message(message: Any) -> None:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise RequestFailed(400, "messages: each must be an object with a role")
    content = message.get("content", "")
    if isinstance(content, list):
        for part in content:
            if not isinstance(part, dict) or not isinstance(part.get("text"), str):
                raise RequestFailed(400, "messages: content may have parts of type text only")
            if part.get("type") != "text":
                raise RequestFailed(400, "messages: content may have parts of type text only")
    elif not isinstance(content, str | None):
        raise RequestFailed(400, "messages: content must be a string or a list of parts")
    calls = message.get("tool_calls") or []
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise RequestFailed(400, "messages: tool_calls must be a list of objects")


def _text(body: dict[str, Any], vocabulary: int) -> dict[str, Any]:
    prompt = body.get("prompt")
    if isinstance(prompt, list) and len(prompt) == 1 and not isinstance(prompt[0], int):
        prompt = prompt[0]
    if isinstance(prompt, list):
        if not all(_is_integer(token, 0, vocabulary - 1) for token in prompt):
            raise RequestFailed(
                400, f"prompt must be one text, or token ids from 0 to {vocabulary - 1}"
            )
    elif not isinstance(prompt, str):
        raise RequestFailed(400, "prompt must be a string")
    logprobs = body.get("logprobs", False)
    if not isinstance(logprobs, bool):
        # OpenAI's completions take a number where its chat takes two fields.
        body["top_logprobs"] = _integer(body, "logprobs", 0, 11)
        body["logprobs"] = True
    return body | {"prompt": prompt}


def _stop(stop: Any) -> list[str]:
    stop = [stop] if isinstance(stop, str) else stop
    if (
        not isinstance(stop, list)
        or len(stop) > MAX_STOPS
        or not all(isinstance(text, str) and text for text in stop)
    ):
        raise RequestFailed(
            400, f"stop must be a string, or at most {MAX_STOPS}, none of them empty"
        )
    return stop


def _logit_bias(bias: Any, vocabulary: int) -> dict[str, float]:
    if bias is None:
        return {}
    if isinstance(bias, dict) and len(bias) <= vocabulary:
        # A token that is not there would be written to all the same, past the logits' end.
        ids = [int(key) for key in bias if key.isascii() and key.isdigit() and len(key) < 10]
        values = [_is_number(value, -100, 100) for value in bias.values()]
        if len(ids) == len(bias) and all(n < vocabulary for n in ids) and all(values):
            return bias
    raise RequestFailed(
        400, f"logit_bias must map token ids below {vocabulary} to numbers from -100 to 100"
    )


def _typed(body: dict[str, Any], name: str, kind: type, words: str) -> Any:
    value = body.get(name)
    if value is not None and not isinstance(value, kind):
        raise RequestFailed(400, f"{name} must be {words}")
    return value


def _number(body: dict[str, Any], name: str, least: float, most: float) -> float:
    if not _is_number(body[name], least, most):
        raise RequestFailed(400, f"{name} must be a number from {least} to {most}")
    return body[name]


def _integer(body: dict[str, Any], name: str, least: int, most: int) -> int:
    if not _is_integer(body[name], least, most):
        raise RequestFailed(400, f"{name} must be a whole number from {least} to {most}")
    return body[name]


def _is_number(value: Any, least: float, most: float) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and least <= value <= most


def _is_integer(value: Any, least: int, most: int) -> bool:
    return isinstance(value, int) and _is_number(value, least, most)


def _finite(text: str) -> float:
    value = float(text)
    return value if math.isfinite(value) else _refuse(text)


def _refuse(text: str) -> Any:
    raise ValueError(f"{text[:20]} is not a number here")
