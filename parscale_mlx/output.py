"""Write a folder whole or not at all, and replace an old one only when asked to."""

import errno
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# What renaming a folder to a place says where another stands there.
TAKEN = (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR)


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
    meanwhile = f"{output} was made by another process meanwhile"
    if output.exists():
        if not force:
            raise FileExistsError(meanwhile)
        output.rename(replaced)
    try:
        new.rename(output)
    except BaseException as error:
        if replaced.exists() and not output.exists():
            replaced.rename(output)
        if isinstance(error, OSError) and error.errno in TAKEN:  # since the lines above
            raise FileExistsError(meanwhile) from error
        raise
