"""The tokenizer of a model's folder, as mlx-lm's generators take it."""

from pathlib import Path
from typing import Any

from mlx_lm import utils as mlx_lm_utils
from mlx_lm.tokenizer_utils import TokenizerWrapper
from parscale_core.checkpoint.tokenizer import check_vocabulary, end_tokens, opening


def load_tokenizer(folder: Path, config: dict[str, Any]) -> TokenizerWrapper:
    """The tokenizer in a model's folder.

    Raises:
        FileNotFoundError: the folder has none.
        ValueError: it cannot be read, or only by running code from the folder.
    """
    if not any(folder.glob("tokenizer*")):
        raise FileNotFoundError(f"{folder}: no tokenizer files (tokenizer.json) in this folder")
    with opening(folder):
        tokenizer = mlx_lm_utils.load_tokenizer(
            folder, {"trust_remote_code": False}, eos_token_ids=end_tokens(folder)
        )
    check_vocabulary(folder, tokenizer, config["vocab_size"])
    return tokenizer
