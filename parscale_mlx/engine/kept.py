"""KV caches that are kept from one request to the next, by the tokens they hold."""

import json
from collections.abc import Hashable
from pathlib import Path
from typing import Any

from parscale_mlx.cache import Cache
from parscale_mlx.engine.mlx_lm_parts import (
    LRUPromptCache,
    can_trim_prompt_cache,
    load_prompt_cache,
    save_prompt_cache,
    trim_prompt_cache,
)
from parscale_mlx.model import Model

import mlx.core as mx
from parscale_core.checkpoint.output import working_file

TOKENS = "parscale_tokens"
MODEL = "parscale_model"


class KeptCaches:
    """The caches of the latest prompts and answers.

    Args:
        size: how many.
        nbytes: of all together at most.
    """

    def __init__(self, size: int, nbytes: int):
        self._caches = LRUPromptCache(size, nbytes)
        self.size = size
        self.latest: tuple[list[Cache], list[int]] | None = None

    def __len__(self) -> int:
        return len(self._caches)

    @property
    def nbytes(self) -> int:
        return self._caches.nbytes

    def take(self, key: Hashable, prompt: list[int]) -> tuple[list[Cache] | None, int]:
        """A copy of the caches that hold most of a prompt's beginning, and how much they hold.

        At least the prompt's last token is left to be computed: its logits are what generation
        starts from.
        """
        if not self.size:
            return None, 0
        caches, rest = self._caches.fetch_nearest_cache(key, prompt)
        if caches is None:
            return None, 0
        if not rest:
            if not can_trim_prompt_cache(caches):
                return None, 0
            trim_prompt_cache(caches, 1)
        held = len(prompt) - max(1, len(rest))
        return (caches, held) if held else (None, 0)

    def keep(self, key: Hashable, caches: list[Cache], tokens: list[int]) -> None:
        """Keep caches that hold these tokens, besides a prefix."""
        if not self.size or not tokens:
            return
        mx.eval([cache.state for cache in caches])
        self.latest = caches, tokens
        self._caches.insert_cache(key, tokens, caches)


def save(file: Path, model: Model, caches: list[Cache], tokens: list[int]) -> None:
    """Write caches and their tokens to a safetensors file, whole or not at all.

    Raises:
        OSError: the file cannot be written.
    """
    metadata = {TOKENS: json.dumps(tokens), MODEL: _signature(model)}
    with working_file(file) as new:
        save_prompt_cache(str(new), caches, metadata)


def load(file: Path, model: Model) -> tuple[list[Cache], list[int]]:
    """Read what ``save`` wrote.

    Raises:
        ValueError: the file is not a prompt cache, or was made with another model.
    """
    try:
        caches, metadata = load_prompt_cache(str(file), return_metadata=True)
        tokens, signature = json.loads(metadata[TOKENS]), metadata[MODEL]
    except (RuntimeError, ValueError, KeyError, TypeError, IndexError) as error:
        raise ValueError(f"{file}: not a prompt cache that parscale saved") from error
    if signature != _signature(model):
        raise ValueError(f"{file}: this prompt cache was made with another model")
    mx.eval([cache.state for cache in caches])
    return caches, tokens


def _signature(model: Model) -> str:
    # The first tokens' embeddings tell apart two models of one architecture, and the first
    # layer's prefixes two adapters over one backbone.
    probes = [model.model.embed_tokens(mx.arange(8)).sum(axis=-1)]
    if model.args.prefix_length:
        probes.append(model.layers[0].self_attn.prefix_k.sum(axis=(1, 2, 3)))
    probe: Any = mx.concatenate(probes).tolist()
    fields = {k: str(v) for k, v in sorted(vars(model.args).items()) if not isinstance(v, dict)}
    return json.dumps([fields, [round(float(x), 3) for x in probe]])
