"""The Hugging Face hub: download a model, upload a converted one."""

from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
)
from huggingface_hub.utils import validate_repo_id

from parscale_core.checkpoint.tokenizer import TOKENIZER_FILES
from parscale_core.checkpoint.weight_files import PICKLE, SAFETENSORS, read_index
from parscale_core.error_text import one_line

BESIDE = (
    "config.json", "generation_config.json", "README.md",
    "adapters/*/adapter_config.json", "adapters/*/adapters.safetensors",
)  # fmt: skip
FAILURES = (HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled, OSError)


def download(name: str, revision: str | None = None) -> Path:
    """Download what this package reads of a hub repository; its folder in the hub's cache.

    Raises:
        FileNotFoundError: there is no such repository, it holds no weights, or it cannot be reached
            and is not in the cache.
    """
    try:
        return Path(snapshot_download(name, revision=revision, **_what(name, revision)))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = one_line(error)
        if isinstance(error, LocalEntryNotFoundError):
            reason = "which cannot be reached, nor is it in the cache"
        raise FileNotFoundError(
            f"{name}: neither a folder here nor a model on the hub ({reason})"
        ) from error


def list_repo_files(name: str, revision: str | None) -> list[str]:
    """The names of all files of a repository; without a network, it fails at once."""
    api = HfApi()
    api.model_info(name, revision=revision)  # tried once, and a listing again and again
    return api.list_repo_files(name, revision=revision)


def _what(name: str, revision: str | None) -> dict[str, Any]:
    """What to download, as arguments of ``snapshot_download``."""
    try:
        listing = list_repo_files(name, revision)
    except (HFValidationError, HfHubHTTPError):
        raise
    except Exception:  # offline, or whatever the HTTP client of this version of the hub's raises
        return {"local_files_only": True}

    def shards(index: str) -> list[str]:
        return sorted(
            set(read_index(Path(hf_hub_download(name, index, revision=revision))).values())
        )

    return {"allow_patterns": files_of_a_model(listing, shards)}


def files_of_a_model(listing: list[str], shards: Callable[[str], list[str]]) -> list[str]:
    """Which files of a repository make up its model; the same as ``folder.find_weights`` finds.

    Args:
        listing: the names of all its files.
        shards: the names of the files that an index names.

    Raises:
        FileNotFoundError: none are weights.
    """
    found = []
    for weights in (SAFETENSORS, PICKLE):
        if weights in listing:
            found = [weights]
        elif (index := f"{weights}.index.json") in listing:
            found = [index, *shards(index)]
        if found:
            break
    else:
        raise FileNotFoundError(f"no {SAFETENSORS}, {PICKLE} or index of their shards in it")
    beside = (*BESIDE, *TOKENIZER_FILES)
    return found + [
        name
        for name in listing
        if any(
            fnmatch(name, pattern) and name.count("/") == pattern.count("/") for pattern in beside
        )
    ]


def check_data_set(name: str) -> None:
    """Find out with a single request whether the hub has a data set.

    Raises:
        FileNotFoundError: it has none of this name, or cannot be reached.
    """
    try:
        if name.startswith((".", "/", "~")) or Path(name).suffix:
            raise HFValidationError("this looks like a path")
        HfApi().dataset_info(name, timeout=10)
    except OfflineModeIsEnabled:  # it may be in the cache
        return
    except Exception as error:  # whatever the HTTP client of this version of the hub's raises
        raise FileNotFoundError(
            f"{name}: neither a file or folder here nor a data set on the hub ({one_line(error)})"
        ) from error


def check_login(repo: str) -> None:
    """Find out before hours of work whether an upload could go through.

    Raises:
        ValueError: ``repo`` is not a repository's name.
        OSError: nobody is logged in, or the hub cannot be reached.
    """
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise ValueError(f"{repo!r} is not the name of a hub repository (owner/name)") from error
    try:
        HfApi().whoami()
    except FAILURES as error:
        raise OSError(
            f"cannot upload to {repo}: log in with 'hf auth login' ({one_line(error)})"
        ) from error


def upload(folder: Path, repo: str) -> str:
    """Upload a folder as a model repository, made if need be; returns its address.

    Raises:
        OSError: the hub refused it or could not be reached.
    """
    api = HfApi()
    try:
        url = api.create_repo(repo, exist_ok=True)
        api.upload_folder(
            repo_id=repo, folder_path=folder, commit_message="Convert to MLX with parscale"
        )
    except FAILURES as error:
        raise OSError(
            f"{folder} is converted, but not uploaded to {repo}: {one_line(error)}"
        ) from error
    return str(url)
