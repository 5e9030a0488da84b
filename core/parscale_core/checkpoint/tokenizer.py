"""A model folder's tokenizer: its files, its chat template, and what they say of its tokens."""

import json
import logging
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from parscale_core.checkpoint.config import read_json
from parscale_core.checkpoint.links import check_link
from parscale_core.error_text import one_line

TOKENIZER, CONFIG = "tokenizer.json", "tokenizer_config.json"
VOCABULARIES = ("tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
TOKENIZER_FILES = (
    "tokenizer*", "*token*.json", "*.jinja", "chat_template*", "*.txt", "*.tiktoken", "vocab.*",
)  # fmt: skip


def end_tokens(folder: Path, tokenizer: Any = None) -> list[int]:
    """Ids of the tokens that end a text: all that any file of a model folder names, each once.

    config.json and generation_config.json name ids, the tokenizer's files name a token: published
    chat models have the base model's end in the first and the end of a turn in the last.

    Args:
        tokenizer: the folder's, where it is open: its class may have an end that no file names.

    Raises:
        ValueError: a file is not a JSON object, or what it says is not an id or a list of ids.
    """
    ends: list[int] = []
    for name in ("config.json", "generation_config.json"):
        ends += _ids(folder / name, read_object(folder / name).get("eos_token_id"))
    if (token := _end_of_text(folder)) is not None:
        ends += [number] if (number := _token_id(folder, token)) is not None else []
    if (own := getattr(tokenizer, "eos_token_id", None)) is not None:
        ends.append(own)
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


def write_tokenizer(origin: Path, folder: Path, *, inline_template: bool) -> None:
    """Copy a model's tokenizer so that any runtime can read it; nothing where there is none.

    Runtimes other than transformers read tokenizer.json alone, which is made where it is missing,
    and stumble over a chat template that is null or a list.

    Args:
        inline_template: put the chat template into tokenizer_config.json, wherever it was.

    Raises:
        ValueError: there is no tokenizer.json, and none can be made of what there is.
    """
    copy_files(origin, folder)
    if not (origin / TOKENIZER).is_file():
        if not any((origin / name).is_file() for name in VOCABULARIES):
            return
        load_tokenizer(origin).save_pretrained(folder)
        origin = folder
    before, template = read_object(origin / CONFIG), chat_template(origin)
    config = {key: value for key, value in before.items() if key != "chat_template"}
    if template is not None and (inline_template or before.get("chat_template") is not None):
        config["chat_template"] = template
    if config != before:
        file = folder / CONFIG
        file.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def load_tokenizer(folder: Path) -> Any:
    """A folder's tokenizer as transformers opens it; no code in the folder runs.

    Raises:
        ValueError: it cannot be read, or has no form that tokenizer.json could hold.
    """
    import transformers

    with opening(folder):
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        if not tokenizer.is_fast:
            raise ValueError(f"{type(tokenizer).__name__} has no fast form")
    return tokenizer


@contextmanager
def opening(folder: Path) -> Iterator[None]:
    """However a tokenizer is opened: its templates are bounded, and what is wrong is one line.

    Raises:
        ValueError: it cannot be read.
    """
    import transformers

    from parscale_core.checkpoint.chat_template import bound_templates

    bound_templates()
    # transformers warns of every model_type it has no class for; only its tokenizer is wanted here.
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        yield
    except Exception as error:  # transformers and tokenizers raise bare Exceptions for bad files
        raise ValueError(f"{folder}: the tokenizer cannot be read: {one_line(error)}") from error
    finally:
        transformers.logging.set_verbosity(verbosity)


def chat_template(folder: Path) -> str | None:
    """A model's chat template, the default one where it has several by name.

    Raises:
        ValueError: a file is not a JSON object, or its template is not text.
    """
    file = folder / "chat_template.jinja"
    if file.is_file():
        try:
            return file.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{file}: not UTF-8 text") from error
    for name in ("chat_template.json", CONFIG):
        template = read_object(folder / name).get("chat_template")
        if isinstance(template, list):
            named = {t.get("name"): t.get("template") for t in template if isinstance(t, dict)}
            template = named.get("default")
        if isinstance(template, str):
            return template
        if template is not None:
            raise ValueError(f"{folder / name}: chat_template is neither a text nor a list of them")
    return None


def check_vocabulary(folder: Path, tokenizer: Any, vocab_size: int) -> None:
    """Say once where a tokenizer has tokens that the model's embedding lacks."""
    largest = max(tokenizer.get_vocab().values(), default=0)
    if largest >= vocab_size:
        logging.getLogger("parscale").warning(
            "%s: the tokenizer has tokens up to %d, but the model only %d; a text with others is "
            "refused", folder, largest, vocab_size
        )  # fmt: skip


def check_tokens(ids: Iterable[int], vocab_size: int) -> None:
    """Refuse tokens that the model's embedding lacks.

    Raises:
        ValueError: there is one.
    """
    largest = max(ids, default=0)
    if largest >= vocab_size:
        raise ValueError(f"token {largest} is not in the model's vocabulary of {vocab_size}")


def _ids(file: Path, value: Any) -> list[int]:
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if not all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in ids):
        raise ValueError(f"{file}: eos_token_id is {value!r}, where token ids are needed")
    return ids


def _end_of_text(folder: Path) -> str | None:
    for name in (CONFIG, "special_tokens_map.json"):
        token = read_object(folder / name).get("eos_token")
        if isinstance(token, dict):  # an AddedToken
            token = token.get("content")
        if token is not None:
            return str(token)
    return None


def _token_id(folder: Path, token: str) -> int | None:
    whole = read_object(folder / TOKENIZER)
    decoder = read_object(folder / CONFIG).get("added_tokens_decoder") or {}
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
