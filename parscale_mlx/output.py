"""Write a folder whole or not at all, and replace an old one only when asked to."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def check_output(output: Path, *, force: bool, marker: str = "config.json") -> None:
    """Find out before the work whether ``output`` may be written.

    Args:
        marker: the file that tells a folder of the kind to be written from any other.

    Raises:
        FileExistsError: it exists and ``force`` is not given, or it is something else.
    """
    if not output.exists():
        return
    if not force:
        raise FileExistsError(f"{output} exists already (--force replaces it)")
    if not output.is_dir() or (any(output.iterdir()) and not (output / marker).is_file()):
        kind = "a model folder" if marker == "config.json" else f"a folder with {marker}"
        raise FileExistsError(f"{output} is not {kind}; --force replaces only those")


@contextmanager
def working_folder(output: Path) -> Iterator[Path]:
    """A temporary folder on the disk of ``output``, so that the result only has to be renamed."""
    parent = next(folder for folder in output.absolute().parents if folder.is_dir())
    with tempfile.TemporaryDirectory(prefix=f".{output.name}.", dir=parent) as work:
        yield Path(work)


def place(new: Path, output: Path, replaced: Path, *, force: bool) -> None:
    """Move a finished folder to where it belongs, and what was there to ``replaced``.

    Raises:
        FileExistsError: ``output`` appeared since ``check_output``.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    if output.exists():
        if not force:
            raise FileExistsError(f"{output} was made by another process meanwhile")
        output.rename(replaced)
    try:
        new.rename(output)
    except BaseException:
        if replaced.exists():
            replaced.rename(output)
        raise
