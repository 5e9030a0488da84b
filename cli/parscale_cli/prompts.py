"""From what the user gave to token ids."""

import sys
from pathlib import Path
from typing import Any

import click
from parscale_core.jsonl import read_lines
from parscale_core.serve.prompt import plain_message

Messages = list[dict[str, Any]]


def read_prompts(texts: tuple[str, ...], file: Path | None) -> list[str | Messages]:
    """The prompts of ``--prompt`` ("-" is standard input) and of a JSON-lines file.

    A line of the file is a string, {"prompt": text} or {"messages": [{"role", "content"}, ...]}.

    Raises:
        click.UsageError: there is none, one is empty, or standard input is asked for twice.
        ValueError: a line of the file is none of those; the message names file and line.
    """
    if texts.count("-") > 1:
        raise click.UsageError("--prompt - reads standard input, which can be read only once")
    prompts: list[str | Messages] = [sys.stdin.read() if t == "-" else t for t in texts]
    if file is not None:
        prompts += [_prompt(place, value) for place, value in read_lines(file)]
    if not prompts:
        raise click.UsageError("give --prompt TEXT, --prompt - or --prompts-file FILE")
    if any(not prompt or prompt == "\n" for prompt in prompts):
        raise click.UsageError("a prompt is empty")
    return prompts


def encode(
    tokenizer, prompt: str | Messages, *, system: str | None, use_template: bool
) -> list[int]:
    """Token ids of a prompt, through the model's chat template where it has one.

    Raises:
        ValueError: a system prompt or messages, but no chat template to put them in.
        UnicodeError: bytes or halves of characters that are no text.
    """
    if not use_template or not tokenizer.chat_template:
        if system is not None or not isinstance(prompt, str):
            raise ValueError(
                "system prompts and messages need a chat template, which this model lacks"
            )
        return tokenizer.encode(as_text(prompt))
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    if system is not None:
        messages = [{"role": "system", "content": system}, *messages]
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    return tokenizer.encode(as_text(text), add_special_tokens=False)


def as_text(text: str) -> str:
    """The same, if it is one: a tokenizer's own error says nothing of that.

    Raises:
        UnicodeError: it has bytes or halves of characters.
    """
    text.encode()
    return text


def _prompt(place: str, value: Any) -> str | Messages:
    if isinstance(value, dict):
        value = value.get("prompt", value.get("messages"))
    if isinstance(value, list) and all(_is_message(message) for message in value):
        return [plain_message(message) for message in value]
    if isinstance(value, str):
        return value
    raise ValueError(
        f'{place}: neither a string nor {{"prompt": ...}} nor {{"messages": [...]}} of texts'
    )


def _is_message(value: Any) -> bool:
    if not isinstance(value, dict) or not isinstance(value.get("role"), str):
        return False
    content = value.get("content", 0)
    is_parts = isinstance(content, list) and all(
        isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)
        for part in content
    )
    return is_parts or isinstance(content, str | None)
