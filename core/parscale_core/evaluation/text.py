"""Held-out text: documents from files, and windows of their tokens."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from parscale_core.jsonl import read_lines


@dataclass
class Window:
    """Tokens to be read at once.

    Attributes:
        document: which one they are from, counted from 0.
        scored: how many of them, at the end, no earlier window has scored.
    """

    document: int
    tokens: list[int]
    scored: int


def read_documents(file: Path) -> list[str]:
    """A text file is one document; each line of a .jsonl file is one, a string or {"text": ...}.

    Raises:
        ValueError: it is not UTF-8, or a line is neither; the message names file and line.
    """
    if file.suffix == ".jsonl":
        documents = [_document(place, value) for place, value in read_lines(file)]
    else:
        try:
            documents = [file.read_text(encoding="utf-8")]
        except UnicodeDecodeError as error:
            raise ValueError(f"{file}: not text in UTF-8 ({error.reason})") from error
    return [document for document in documents if document.strip()]


def _document(place: str, value: Any) -> str:
    text = value.get("text") if isinstance(value, dict) else value
    if not isinstance(text, str):
        raise ValueError(f'{place}: neither a string nor {{"text": ...}}')
    return text


def windows(
    documents: list[str], encode: Callable[[str], list[int]], size: int, stride: int
) -> Iterator[Window]:
    """Windows that begin ``stride`` tokens apart; together they score every token but the first.

    Of a document longer than one window, each token after the first window is predicted from at
    least ``size - stride`` tokens before it.
    """
    for number, document in enumerate(documents):
        tokens, done = encode(document), 1
        for begin in range(0, max(len(tokens) - 1, 0), stride):
            end = min(begin + size, len(tokens))
            yield Window(number, tokens[begin:end], end - done)
            done = end
            if end == len(tokens):
                break
