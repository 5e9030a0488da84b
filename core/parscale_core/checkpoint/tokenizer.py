"""A model folder's tokenizer files, and what they say of its tokens; no tokenizer is loaded."""

import shutil
from pathlib import Path
from typing import Any

from parscale_core.checkpoint.config import read_json
from parscale_core.checkpoint.links import check_link

TOKENIZER_FILES = (
    "tokenizer*", "*token*.json", "*.jinja", "chat_template*", "*.txt", "*.tiktoken", "vocab.*",
)  # fmt: skip


def end_tokens(folder: Path) -> list[int]:
    """Ids of the tokens that end a text: all that any file of a model folder names, each once.

    config.json and generation_config.json name ids, the tokenizer's files name a token: published
    chat models have the base model's end in the first and the end of a turn in the last.

    Raises:
        ValueError: a file is not a JSON object, or what it says is not an id or a list of ids.
    """
    ends: list[int] = []
    for name in ("config.json", "generation_config.json"):
        ends += _ids(folder / name, read_object(folder / name).get("eos_token_id"))
    if (token := _end_of_text(folder)) is not None:
        ends += [number] if (number := _token_id(folder, token)) is not None else []
    return list(dict.fromkeys(ends))


def read_object(file: Path) -> dict[str, Any]:
    """A file's JSON object; an empty one where there is no such file.

    Raises:
        ValueError: it is not a JSON object.
    """
    return read_json(file) if file.is_file() else {}


def tokenizer_files(folder: Path) -> list[Path]:
    """The files of a folder's tokenizer, sorted by name."""
    found = {file for pattern in TOKENIZER_FILES for file in folder.glob(pattern)}
    return sorted(file for file in found if file.is_file())


def copy_files(origin: Path, folder: Path) -> None:
    """Copy what makes a folder's weights a usable model: tokenizer and generation settings."""
    for file in [*tokenizer_files(origin), origin / "generation_config.json"]:
        if file.is_file():
            check_link(file)
            shutil.copyfile(file, folder / file.name)


def _ids(file: Path, value: Any) -> list[int]:
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if not all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in ids):
        raise ValueError(f"{file}: eos_token_id is {value!r}, where token ids are needed")
    return ids


def _end_of_text(folder: Path) -> str | None:
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        token = read_object(folder / name).get("eos_token")
        if isinstance(token, dict):  # an AddedToken
            token = token.get("content")
        if token is not None:
            return str(token)
    return None


def _token_id(folder: Path, token: str) -> int | None:
    whole = read_object(folder / "tokenizer.json")
    decoder = read_object(folder / "tokenizer_config.json").get("added_tokens_decoder") or {}
    try:
        added = {entry["content"]: entry["id"] for entry in whole.get("added_tokens") or []}
        added |= {entry["content"]: int(number) for number, entry in decoder.items()}
        vocabulary = (whole.get("model") or {}).get("vocab") or {}
        if isinstance(vocabulary, list):  # Unigram's: pieces with their scores
            vocabulary = {piece: number for number, (piece, _) in enumerate(vocabulary)}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{folder}: the tokenizer's files list their tokens wrongly") from error
    files = [read_object(folder / name) for name in ("vocab.json", "added_tokens.json")]
    return next((ids[token] for ids in (added, vocabulary, *files) if token in ids), None)
