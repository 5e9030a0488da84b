"""Files of JSON lines, read one way everywhere."""

import json
from pathlib import Path
from typing import Any

BOM = b"\xef\xbb\xbf"


def read_lines(file: Path) -> list[tuple[str, Any]]:
    """Each line's place, as "FILE, line N", and its value; blank lines are left out.

    Raises:
        ValueError: a line is not JSON in UTF-8; the message names file and line.
    """
    return lines_of(file.read_bytes(), str(file))


def lines_of(data: bytes, name: str) -> list[tuple[str, Any]]:
    """As ``read_lines``, of a file's bytes.

    Lines end at the byte ``\\n`` only: other characters that Python calls line ends may stand in
    JSON's strings.
    """
    found = []
    for number, line in enumerate(data.removeprefix(BOM).split(b"\n"), 1):
        if not line.strip():
            continue
        place = f"{name}, line {number}"
        try:
            found.append((place, json.loads(line.decode("utf-8"))))
        except UnicodeDecodeError as error:
            raise ValueError(f"{place}: not UTF-8 text ({error.reason})") from error
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{place}: not JSON ({error})") from error
    return found
