"""Calls of tools in an answer's text, as the templates of Qwen, Hermes and SmolLM ask for them."""

import json
from dataclasses import dataclass
from uuid import uuid4

START, END = "<tool_call>", "</tool_call>"


@dataclass
class Call:
    """A call of a tool.

    Attributes:
        arguments: a JSON object, as text.
    """

    name: str
    arguments: str

    def __post_init__(self) -> None:
        self.id = f"call_{uuid4().hex[:24]}"


class CallReader:
    """Takes the calls out of a text that comes in pieces; what cannot be read stays text."""

    def __init__(self) -> None:
        self._text = ""

    def push(self, text: str) -> tuple[str, list[Call]]:
        """Add text; returns what is no part of a call, and the calls that are complete."""
        self._text += text
        content = ""
        calls: list[Call] = []
        while True:
            begin = self._text.find(START)
            if begin < 0:
                keep = next(
                    (n for n in range(len(START) - 1, 0, -1) if self._text.endswith(START[:n])), 0
                )
                cut = len(self._text) - keep
                content, self._text = content + self._text[:cut], self._text[cut:]
                return content, calls
            end = self._text.find(END, begin)
            if end < 0:
                content, self._text = content + self._text[:begin], self._text[begin:]
                return content, calls
            found = read_calls(self._text[begin + len(START) : end])
            content += self._text[: begin if found else end + len(END)]
            calls += found
            self._text = self._text[end + len(END) :]

    def flush(self) -> tuple[str, list[Call]]:
        """The rest, at the end of the answer: a call may lack its end."""
        text, self._text = self._text, ""
        found = read_calls(text.removeprefix(START)) if text.startswith(START) else []
        return ("", found) if found else (text, [])


def read_calls(text: str) -> list[Call]:
    """The calls that a text is, one JSON object or a list of them; none if it is not."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return []
    calls = []
    for call in value if isinstance(value, list) else [value]:
        if not isinstance(call, dict) or not isinstance(call.get("name"), str):
            return []
        arguments = call.get("arguments", call.get("parameters", {}))
        if isinstance(arguments, str):
            calls.append(Call(call["name"], arguments))
        elif isinstance(arguments, dict):
            calls.append(Call(call["name"], json.dumps(arguments, ensure_ascii=False)))
        else:
            return []
    return calls
