"""Write a folder or a file whole or not at all, and replace an old one only when asked to."""

import errno
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

# What renaming a folder to a place says where another stands there.
TAKEN = (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR)
# What the disk says; other errors in a working folder may be another file's.
DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EFBIG, errno.EIO)
FULL = 1 << 20  # bytes: a disk with fewer free is what stopped a library that does not say why

MODEL, ADAPTER, EXPORT = "config.json", "adapter_config.json", "*.onnx"
_KINDS = {MODEL: "a model folder", EXPORT: "an ONNX export"}
LOCK = "lock"
# Told of each working folder: where a process is killed, another can delete it.
on_working_folder: Callable[[Path], None] | None = None


def check_output(output: Path, *, force: bool, marker: str = MODEL) -> None:
    """Find out before the work whether a folder may be written.

    Args:
        marker: a pattern of the file that tells a folder of the kind to be written from any other;
            it may also lie one folder down.

    Raises:
        FileExistsError: it exists and ``force`` is not given, or it is something else.
        NotADirectoryError, OSError: it cannot be made where it should be.
    """
    _check_parent(output)
    if not output.exists() and not output.is_symlink():
        return
    if not force:
        raise FileExistsError(f"{output} exists already (force=True replaces it)")
    if (
        output.is_symlink()
        or not output.is_dir()
        or not (any(output.glob(marker)) or any(output.glob(f"onnx/{marker}")) or _empty(output))
    ):
        kind = _KINDS.get(marker, f"a folder with {marker}")
        raise FileExistsError(f"{output} is not {kind}; force=True replaces only those")


def check_file(file: Path, *, force: bool) -> None:
    """Find out before the work whether a file may be written.

    Raises:
        FileExistsError: it exists and ``force`` is not given, or it is no file.
        FileNotFoundError: there is no folder for it.
        NotADirectoryError, OSError: it cannot be made where it should be.
    """
    if not file.absolute().parent.exists():
        raise FileNotFoundError(f"{file}: there is no folder {file.parent}")
    _check_parent(file)
    if file.is_dir():
        raise FileExistsError(f"{file} is a folder")
    if file.exists() and not force:
        raise FileExistsError(f"{file} exists already (force=True replaces it)")


@contextmanager
def working_file(file: Path) -> Iterator[Path]:
    """A file of another name beside ``file``, which becomes it when the block ends well."""
    with working_folder(file) as work:
        yield work / file.name
        (work / file.name).replace(file)


@contextmanager
def working_folder(output: Path) -> Iterator[Path]:
    """A temporary folder on the disk of ``output``, so that the result only has to be renamed.

    Those that killed processes left for the same output are deleted first.

    Raises:
        OSError: the disk is full or may not be written; it names ``output``.
    """
    parent = _existing_parent(output)
    prefix = f".{output.name}.work-"
    _sweep(parent, prefix)
    work = _make_folder(output, parent, prefix)
    if on_working_folder is not None:
        on_working_folder(work)
    try:
        # Locked before it has the name that others look at.
        with (work / "new").open("w") as lock, _naming(output, work):
            if fcntl is not None:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            (work / "new").rename(work / LOCK)
            yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)


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


def _empty(folder: Path) -> bool:
    return not any(folder.iterdir())


def _existing_parent(output: Path) -> Path:
    return next(folder for folder in output.absolute().parents if folder.exists())


def _check_parent(output: Path) -> None:
    parent = _existing_parent(output)
    if not parent.is_dir():
        raise NotADirectoryError(f"{output}: {parent} is not a folder")
    _make_folder(output, parent, f".{output.name}.probe-").rmdir()


def _make_folder(output: Path, parent: Path, prefix: str) -> Path:
    try:
        return Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
    except OSError as error:
        why = f"cannot be written: {(error.strerror or str(error)).lower()}"
        raise OSError(f"{output} {why} (in {parent})") from error


@contextmanager
def _naming(output: Path, work: Path) -> Iterator[None]:
    """Where the disk cannot take what is written, say so of ``output``."""
    try:
        yield
    except Exception as error:
        if isinstance(error, OSError) and (error.errno or type(error) is not OSError):
            own = error.filename is None or str(error.filename).startswith(str(work))
            if own and error.errno in DISK:
                raise OSError(error.errno, os.strerror(error.errno), str(output)) from error
            raise
        # MLX, safetensors, onnx and numpy name neither file nor cause.
        if "No space left" in str(error) or shutil.disk_usage(work).free < FULL:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(output)) from error
        raise


def _sweep(parent: Path, prefix: str) -> None:
    """Delete working folders that no living process holds the lock of."""
    if fcntl is None:
        return
    for left in parent.iterdir():
        if not left.name.startswith(prefix):
            continue
        # No lock yet: made this moment, or by a process that was killed this moment.
        with suppress(OSError), (left / LOCK).open("r") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(left, ignore_errors=True)
