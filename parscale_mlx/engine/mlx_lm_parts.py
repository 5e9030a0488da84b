"""Everything of mlx-lm's that generation uses and mlx-lm does not document.

``tests/mlx/test_mlx_lm_contract.py`` holds a test for each line, and CI runs it with the oldest and
the newest mlx-lm that pyproject.toml allows.
"""

from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import mlx.core as mx
from mlx_lm.generate import (
    BatchGenerator,  # insert(caches=, all_tokens=, samplers=, logits_processors=), next, remove
    generate_step,  # continues a given prompt_cache
    generation_stream,  # the stream that the generators compute on
    maybe_quantize_kv_cache,  # in place, as generate_step does between parts of a prompt
    speculative_generate_step,  # prompt_cache: the model's caches, then the draft's
    wired_limit,
)
from mlx_lm.models.cache import (
    LRUPromptCache,  # fetch_nearest_cache, insert_cache, nbytes
    can_trim_prompt_cache,
    load_prompt_cache,
    save_prompt_cache,
    trim_prompt_cache,
)
from mlx_lm.sample_utils import make_logits_processors
from mlx_lm.tokenizer_utils import TokenizerWrapper
from packaging.version import Version

# Before 0.32 (which Python 3.10 has not) a batch loses track of its rows' processors when none of
# them has any; then each has one that does nothing.
NO_PROCESSORS: list[Callable[[mx.array, mx.array], mx.array]] = (
    [] if Version(version("mlx-lm")) >= Version("0.32") else [lambda tokens, logits: logits]
)


def unwrapped(tokenizer: Any) -> tuple[Any, frozenset[int]]:
    """The transformers tokenizer in mlx-lm's wrapper, or itself, and the ids that end a text."""
    if isinstance(tokenizer, TokenizerWrapper):
        return tokenizer._tokenizer, frozenset(tokenizer.eos_token_ids)
    return tokenizer, frozenset({tokenizer.eos_token_id} - {None})


__all__ = [
    "NO_PROCESSORS",
    "BatchGenerator",
    "LRUPromptCache",
    "can_trim_prompt_cache",
    "generate_step",
    "generation_stream",
    "load_prompt_cache",
    "make_logits_processors",
    "maybe_quantize_kv_cache",
    "save_prompt_cache",
    "speculative_generate_step",
    "trim_prompt_cache",
    "unwrapped",
    "wired_limit",
]
