"""Training data: text files, folders, mlx-lm's JSON lines and hub data sets, as token ids."""

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import transformers
from mlx_lm.tuner.datasets import create_dataset, load_hf_dataset
from parscale_core.checkpoint.hub import check_data_set
from parscale_core.jsonl import read_lines

FORMS = '{"text": ...}, {"messages": [...]} or {"prompt": ..., "completion": ...}'


@dataclass
class Document:
    """Token ids, int32, and how many at the beginning are only read: a prompt's.

    Attributes:
        source: file and line, for messages.
    """

    tokens: np.ndarray
    prompt: int
    source: str


def read_documents(
    paths: list[str], tokenizer: Any, *, pattern: str = "*", mask_prompt: bool = True
) -> list[Document]:
    """Read training data.

    Args:
        paths: files, folders, or names of hub data sets. A folder with a ``train.jsonl`` stands for
            that file, any other for all UTF-8 text files in it, in the order of their names.
        pattern: which files of a folder, such as "*.py".
        mask_prompt: whether a chat's or completion's prompt is only read.

    Raises:
        FileNotFoundError: there is no such file, folder or data set.
        ImportError: a hub data set is named and ``datasets`` is not installed.
        ValueError: nothing is in it, or a line is none of mlx-lm's forms.
    """
    if tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer has no end-of-text token, which separates documents")
    # A whole file is longer than a model's window, and transformers would warn of it.
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        found = [d for path in paths for d in _read(path, tokenizer, pattern, mask_prompt)]
    finally:
        transformers.logging.set_verbosity(verbosity)
    if not found:
        raise ValueError(f"{', '.join(paths)}: no text in it to train on")
    return found


def valid_beside(paths: list[str]) -> list[str]:
    """The ``valid.jsonl`` files that belong to folders in mlx-lm's layout."""
    files = [Path(path).expanduser() / "valid.jsonl" for path in paths]
    return [str(file) for file in files if file.is_file()]


def _read(path: str, tokenizer: Any, pattern: str, mask_prompt: bool) -> list[Document]:
    file = Path(path).expanduser()
    if (file / "train.jsonl").is_file():
        file = file / "train.jsonl"
    if file.is_dir():
        return _read_folder(file, tokenizer, pattern)
    if not file.exists():
        return _read_hub(path, tokenizer, mask_prompt)
    if file.suffix == ".jsonl":
        return _read_lines(file, tokenizer, mask_prompt)
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: not UTF-8 text") from error
    return _encode([{"text": text}], [str(file)], tokenizer, mask_prompt)


def _read_folder(folder: Path, tokenizer: Any, pattern: str) -> list[Document]:
    texts, names = [], []
    for file in sorted(folder.rglob(pattern)):
        hidden = any(part.startswith(".") for part in file.relative_to(folder).parts)
        if hidden or not file.is_file():
            continue
        try:
            texts.append({"text": file.read_text(encoding="utf-8")})
        except UnicodeDecodeError:
            continue
        names.append(str(file))
    return _encode(texts, names, tokenizer, False)


def _read_lines(file: Path, tokenizer: Any, mask_prompt: bool) -> list[Document]:
    lines = read_lines(file)
    for place, record in lines:
        if not isinstance(record, dict):
            raise ValueError(f"{place}: none of {FORMS}")
    records, names = [record for _, record in lines], [place for place, _ in lines]
    return _encode(records, names, tokenizer, mask_prompt)


def _read_hub(name: str, tokenizer: Any, mask_prompt: bool) -> list[Document]:
    check_data_set(name)
    try:
        train, _, _ = load_hf_dataset(name, tokenizer, SimpleNamespace(mask_prompt=mask_prompt))
    except ImportError as error:
        raise ImportError(
            f"{name}: no such file or folder here, and a hub data set needs: pip install datasets"
        ) from error
    except (ValueError, OSError, RuntimeError) as error:
        raise FileNotFoundError(
            f"{name}: neither a file or folder here nor a data set on the hub"
        ) from error
    return [_process(train, train[n], f"{name}, row {n}") for n in range(len(train))]


def _encode(
    records: list[dict[str, Any]], names: list[str], tokenizer: Any, mask_prompt: bool
) -> list[Document]:
    if not records:
        return []
    sample = records[0]
    if "text" in sample and not {"messages", "prompt"} & sample.keys():
        mask_prompt = False  # mlx-lm refuses to mask what has no prompt
    if not tokenizer.chat_template and "text" not in sample:
        return _encode_untemplated(records, names, tokenizer, mask_prompt)
    try:
        dataset = create_dataset(records, tokenizer, SimpleNamespace(mask_prompt=mask_prompt))
    except ValueError as error:
        raise ValueError(f"{names[0]}: none of {FORMS}") from error
    return [
        _process(dataset, record, name)
        for record, name in zip(records, names, strict=True)
        if record.get("text", True)
    ]


def _process(dataset: Any, record: dict[str, Any], name: str) -> Document:
    try:
        tokens, prompt = dataset.process(record)
    except Exception as error:  # whatever tokenizer and template make of a record of another form
        raise ValueError(f"{name}: none of {FORMS}") from error
    return Document(np.array(tokens, np.int32), prompt, name)


def _encode_untemplated(
    records: list[dict[str, Any]], names: list[str], tokenizer: Any, mask_prompt: bool
) -> list[Document]:
    documents = []
    for record, name in zip(records, names, strict=True):
        if "messages" in record:
            raise ValueError(f"{name}: messages need a chat template, which this model lacks")
        try:
            prompt = tokenizer.encode(record["prompt"])
            answer = tokenizer.encode(record["completion"], add_special_tokens=False)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{name}: none of {FORMS}") from error
        tokens = np.array([*prompt, *answer, tokenizer.eos_token_id], np.int32)
        documents.append(Document(tokens, len(prompt) if mask_prompt else 0, name))
    return documents
