"""Programming problems in the data formats of HumanEval and MBPP, from local files."""

import gzip
import json
from dataclasses import dataclass
from pathlib import Path

# Where a completion of a function ends: at what would begin something else. HumanEval's are those
# of its paper (arXiv 2107.03374), MBPP's also close the prompt's own docstring.
HUMANEVAL_STOPS = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")
MBPP_STOPS = ("\nclass", "\nassert", '\n"""', "\nprint", "\nif", "\n#")


@dataclass
class Problem:
    """What a model completes, and the program that says whether it did so rightly.

    Attributes:
        stops: texts before which a completion ends.
        before, after: the program is these with the completion between them.
    """

    name: str
    prompt: str
    stops: tuple[str, ...]
    before: str
    after: str

    def program(self, completion: str) -> str:
        return self.before + completion + self.after


def read_problems(file: Path) -> list[Problem]:
    """Problems from a JSON-lines file, which may be compressed with gzip.

    HumanEval's lines have ``task_id``, ``prompt``, ``entry_point`` and ``test``; MBPP's have
    ``task_id``, ``text`` (or ``prompt``), ``test_list``, and ``test_setup_code`` or
    ``test_imports``.

    Raises:
        ValueError: the file is neither; the message names it and the line.
    """
    try:
        raw = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
        lines = raw.decode("utf-8").splitlines()
    except (gzip.BadGzipFile, EOFError, UnicodeDecodeError) as error:
        raise ValueError(f"{file}: not JSON lines in UTF-8, or not gzip") from error
    problems = [_read_line(file, n, line) for n, line in enumerate(lines, 1) if line.strip()]
    if not problems:
        raise ValueError(f"{file}: no problems in it")
    return problems


def _read_line(file: Path, number: int, line: str) -> Problem:
    try:
        value = json.loads(line)
        return _humaneval(value) if "entry_point" in value else _mbpp(value)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{file}, line {number}: not a problem as HumanEval or MBPP has them ({error})"
        ) from error


def _humaneval(value: dict) -> Problem:
    # Without the line's end: in many vocabularies that is one token with the indentation after it,
    # and a model that is given half of it does not go on with the function.
    prompt, test = _text(value["prompt"]).rstrip(), _text(value["test"])
    check = f"\n{test}\ncheck({_text(value['entry_point'])})\n"
    return Problem(str(value["task_id"]), prompt, HUMANEVAL_STOPS, prompt, check)


def _mbpp(value: dict) -> Problem:
    text = _text(value["text"] if "text" in value else value["prompt"])
    tests = [_text(test) for test in value["test_list"]]
    setup = value.get("test_setup_code") or "\n".join(value.get("test_imports") or [])
    # The task and its tests as the docstring of a file that is to be written.
    prompt = '"""\n{}\n{}\n"""'.format(text, "\n".join(tests))
    after = "\n{}\n{}\n".format(_text(setup), "\n".join(tests))
    return Problem(f"MBPP/{value['task_id']}", prompt, MBPP_STOPS, "", after)


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{str(value)[:40]!r} is no text")
    return value
