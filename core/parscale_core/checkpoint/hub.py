"""The Hugging Face hub: download a model, upload a converted one."""

from pathlib import Path

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
)
from huggingface_hub.utils import validate_repo_id

from parscale_core.checkpoint.tokenizer import TOKENIZER_FILES

FAILURES = (HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled, OSError)


def download(name: str, revision: str | None = None) -> Path:
    """Download what this package reads of a hub repository; its folder in the hub's cache.

    Raises:
        FileNotFoundError: there is no such repository, or it cannot be reached.
    """
    try:
        folder = snapshot_download(
            name,
            revision=revision,
            allow_patterns=["*.json", "model*.safetensors", *TOKENIZER_FILES],
        )
        if not any(Path(folder).glob("model*.safetensors")):
            folder = snapshot_download(
                name, revision=revision, allow_patterns=["pytorch_model*.bin"]
            )
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = " ".join(str(error).split())[:120]
        raise FileNotFoundError(
            f"{name}: neither a folder here nor a model on the hub ({reason})"
        ) from error
    return Path(folder)


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
        reason = " ".join(str(error).split())[:200]
        raise OSError(f"cannot upload to {repo}: log in with 'hf auth login' ({reason})") from error


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
        reason = " ".join(str(error).split())[:200]
        raise OSError(f"{folder} is converted, but not uploaded to {repo}: {reason}") from error
    return str(url)
