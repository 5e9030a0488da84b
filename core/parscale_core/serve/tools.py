"""Calls of tools in an answer's text, in the ways that chat templates ask for them."""

import json
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any
from uuid import uuid4

# Mistral's: a list of objects, or names each with an object.
NAMED = re.compile(r"(?:\[TOOL_CALLS\])?\s*([^\s\[\]{}]+)\s*(?:\[CALL_ID\]\s*\w+\s*)?\[ARGS\]\s*")
# Qwen3-Coder's.
FUNCTION = re.compile(r"\s*<function=([^>\n]+)>(.*?)</function>\s*", re.DOTALL)
PARAMETER = re.compile(r"\s*<parameter=([^>\n]+)>\n?(.*?)\n?</parameter>\s*", re.DOTALL)


def _refuse(text: str) -> Any:
    raise ValueError(f"{text} is not JSON")


DECODER = json.JSONDecoder(parse_constant=_refuse)


@dataclass
class Call:
    """A call of a tool.

    Attributes:
        arguments: a JSON object, as text.
        id: nine letters and digits, as Mistral's templates want them.
    """

    name: str
    arguments: str
    id: str = field(default_factory=lambda: uuid4().hex[:9])


@dataclass(frozen=True)
class Marks:
    """What stands around calls.

    Attributes:
        end: empty where calls go on to the answer's end.
        is_bare: an answer that begins with an object may be a call without marks.
    """

    start: str
    end: str = ""
    is_bare: bool = False


TAGS = Marks("<tool_call>", "</tool_call>")  # Qwen, Hermes, SmolLM
MISTRAL = Marks("[TOOL_CALLS]")
GRANITE = Marks("<|tool_call|>")
PHI = Marks("<|tool_call|>", "<|/tool_call|>")
LLAMA = Marks("<|python_tag|>", is_bare=True)


def marks_of(template: str) -> Marks:
    """What a chat template has stand around calls."""
    for marks in (TAGS, MISTRAL):
        if marks.start in template:
            return marks
    if GRANITE.start in template:
        return PHI if PHI.end in template else GRANITE
    return LLAMA if LLAMA.start in template or '"parameters": ' in template else TAGS


class CallReader:
    """Takes the calls out of a text that comes in pieces; what cannot be read stays text.

    Args:
        template: the model's chat template.
        tools: as OpenAI's requests have them; their schemas tell text from numbers where calls do
            not.
    """

    def __init__(self, template: str, tools: Sequence[dict[str, Any]]):
        self._marks, self._tools = marks_of(template), tools
        self._may_be_bare = self._marks.is_bare
        self._text = ""

    def push(self, text: str) -> tuple[str, list[Call]]:
        """Add text; returns what is no part of a call, and the calls that are complete."""
        self._text += text
        content = ""
        calls: list[Call] = []
        if self._may_be_bare:
            begun = self._text.lstrip()
            if begun[:1] in ("", "{"):
                return "", []
            self._may_be_bare = False
        start, end = self._marks.start, self._marks.end
        while (begin := self._text.find(start)) >= 0:
            close = self._text.find(end, begin) if end else -1
            if close < 0:
                content, self._text = content + self._text[:begin], self._text[begin:]
                return content, calls
            found = read_calls(self._text[begin + len(start) : close], self._tools)
            content += self._text[: begin if found else close + len(end)]
            calls += found
            self._text = self._text[close + len(end) :]
        keep = next((n for n in range(len(start) - 1, 0, -1) if self._text.endswith(start[:n])), 0)
        cut = len(self._text) - keep
        content, self._text = content + self._text[:cut], self._text[cut:]
        return content, calls

    def flush(self) -> tuple[str, list[Call]]:
        """The rest, at the end of the answer: a call may lack its end."""
        text, self._text = self._text, ""
        if self._may_be_bare or text.startswith(self._marks.start):
            found = read_calls(text.removeprefix(self._marks.start), self._tools)
            text = "" if found else text
            return text, found
        return text, []


def read_calls(text: str, tools: Sequence[dict[str, Any]]) -> list[Call]:
    """The calls that a text is; none if all of it is not calls."""
    text = text.strip()
    try:
        return _tagged(text, tools) if text.startswith("<function=") else _objects(text)
    except (ValueError, RecursionError):
        return []


def _objects(text: str) -> list[Call]:
    """JSON objects, a list of them, or names with JSON objects."""
    calls, at = [], 0
    while at < len(text):
        head = NAMED.match(text, at)
        value, at = DECODER.raw_decode(text, head.end() if head else at)
        while at < len(text) and text[at] in " \n\t;":
            at += 1
        if head:
            value = {"name": head[1], "arguments": value}
        for call in value if isinstance(value, list) else [value]:
            if not isinstance(call, dict) or not isinstance(call.get("name"), str):
                raise ValueError("not a call")
            calls.append(
                Call(call["name"], _written(call.get("arguments", call.get("parameters"))))
            )
    return calls


def _tagged(text: str, tools: Sequence[dict[str, Any]]) -> list[Call]:
    """Qwen3-Coder's functions, whose parameters are texts."""
    if FUNCTION.sub("", text):
        raise ValueError("more than functions")
    schemas = {tool["function"]["name"]: tool["function"].get("parameters") for tool in tools}
    calls = []
    for name, body in FUNCTION.findall(text):
        if PARAMETER.sub("", body).strip():
            raise ValueError("more than parameters")
        known = (schemas.get(name) or {}).get("properties")
        known = known if isinstance(known, dict) else {}
        arguments = {key: _value(v, known.get(key)) for key, v in PARAMETER.findall(body)}
        calls.append(Call(name, _written(arguments)))
    return calls


def _value(text: str, schema: Any) -> Any:
    """What a text means where a schema asks for it."""
    if isinstance(schema, dict) and schema.get("type") != "string":
        for form in (text, text.lower()):  # Python's True is JSON's true
            with suppress(ValueError):
                return DECODER.decode(form)
    return text


def _written(arguments: Any) -> str:
    """Arguments as JSON, which some models write as a text in it."""
    if isinstance(arguments, str):
        arguments = DECODER.decode(arguments)
    if arguments is not None and not isinstance(arguments, dict):
        raise ValueError("arguments must be an object")
    return json.dumps(arguments or {}, ensure_ascii=False)
