"""The tokenizer of a model's folder, as mlx-lm's generators take it."""

from pathlib import Path

import transformers
from mlx_lm import utils as mlx_lm_utils
from mlx_lm.tokenizer_utils import TokenizerWrapper
from parscale_core.checkpoint.chat_template import bound_templates
from parscale_core.checkpoint.tokenizer import check_vocabulary, end_tokens


def load_tokenizer(folder: Path, config: dict) -> TokenizerWrapper:
    """The tokenizer in a model's folder.

    Raises:
        FileNotFoundError: the folder has none.
        ValueError: it cannot be read, or only by running code from the folder.
    """
    if not any(folder.glob("tokenizer*")):
        raise FileNotFoundError(f"{folder}: no tokenizer files (tokenizer.json) in this folder")
    bound_templates()
    # transformers warns of every model_type it has no class for; only its tokenizer is wanted here.
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        tokenizer = mlx_lm_utils.load_tokenizer(
            folder, {"trust_remote_code": False}, eos_token_ids=end_tokens(folder)
        )
    except Exception as error:  # transformers and tokenizers raise bare Exceptions for bad files
        raise ValueError(f"{folder}: the tokenizer cannot be read: {_one_line(error)}") from error
    finally:
        transformers.logging.set_verbosity(verbosity)
    check_vocabulary(folder, tokenizer, config["vocab_size"])
    return tokenizer


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= 300 else text[:297] + "..."
