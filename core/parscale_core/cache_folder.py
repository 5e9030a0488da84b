"""The user's cache folder: what can be made again, and is kept because that takes long."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import platformdirs

VARIABLE = "PARSCALE_CACHE"


def cache_folder() -> Path:
    """The operating system's place for it, or the folder that ``PARSCALE_CACHE`` names."""
    return Path(os.environ.get(VARIABLE) or platformdirs.user_cache_dir("parscale"))


def entries() -> Iterator[tuple[Path, int]]:
    """The models and exports that are kept, each with its bytes."""
    for folder in sorted(cache_folder().glob("*/*")):
        if folder.is_dir():
            files = [file for file in folder.rglob("*") if file.is_file()]
            yield folder, sum(file.stat().st_size for file in files)


def clear() -> int:
    """Delete all of it; returns how many bytes that were.

    Raises:
        OSError: something cannot be deleted.
    """
    freed = sum(size for _, size in entries())
    for folder in ("models", "exports"):
        if (cache_folder() / folder).is_dir():
            shutil.rmtree(cache_folder() / folder)
    return freed
