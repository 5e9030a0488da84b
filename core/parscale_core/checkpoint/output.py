"""Write a folder whole or not at all, and replace an old one only when asked to."""

import errno
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# What renaming a folder to a place says where another stands there.
TAKEN = (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR)

MODEL, ADAPTER, EXPORT = "config.json", "adapter_config.json", "*.onnx"
_KINDS = {MODEL: "a model folder", EXPORT: "an ONNX export"}


def check_output(output: Path, *, force: bool, marker: str = MODEL) -> None:
    """Find out before the work whether ``output`` may be written.

    Args:
        marker: a pattern of the file that tells a folder of the kind to be written from any other;
            it may also lie one folder down.

    Raises:
        FileExistsError: it exists and ``force`` is not given, or it is something else.
    """
    if not output.exists() and not output.is_symlink():
        return
    if not force:
        raise FileExistsError(f"{output} exists already (--force replaces it)")
    if (
        output.is_symlink()
        or not output.is_dir()
        or not (any(output.glob(marker)) or any(output.glob(f"onnx/{marker}")) or _empty(output))
    ):
        kind = _KINDS.get(marker, f"a folder with {marker}")
        raise FileExistsError(f"{output} is not {kind}; --force replaces only those")


def _empty(folder: Path) -> bool:
    return not any(folder.iterdir())


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
    if output.exists() or output.is_symlink():
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
