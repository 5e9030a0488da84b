"""Prompt caches that know their tokens: reuse what a new prompt shares with an old one."""

import json
import os
import tempfile
from pathlib import Path
from typing import Any

from parscale_mlx.model import Model

import mlx.core as mx
from mlx_lm.models.cache import (
    can_trim_prompt_cache,
    load_prompt_cache,
    save_prompt_cache,
    trim_prompt_cache,
)
from mlx_lm.utils import common_prefix_len

TOKENS = "parscale_tokens"
MODEL = "parscale_model"


def reuse(
    model: Model, cache: list | None, held: list[int], prompt: list[int], **options
) -> tuple[list, list[int]]:
    """Make a cache ready for a prompt, keeping what it already holds of it.

    Args:
        cache: the caches of an earlier call, or None.
        held: the tokens in it, without the prefix.
        prompt: the whole new prompt.
        options: for ``model.make_cache``, where the old cache cannot be used.

    Returns:
        The caches, and the tokens of the prompt that are still to be fed: at least one.
    """
    # The last token is always fed: its logits are what generation starts from.
    shared = min(common_prefix_len(held, prompt), len(prompt) - 1)
    surplus = len(held) - shared
    if cache is None or (surplus > 0 and not can_trim_prompt_cache(cache)):
        return model.make_cache(**options), prompt
    if surplus > 0:
        trim_prompt_cache(cache, surplus)
    return cache, prompt[shared:]


def held_tokens(cache: list, tokens: list[int]) -> list[int]:
    """The part of ``tokens`` (prompt and answer so far) whose keys and values a cache holds."""
    return tokens[: cache[0].offset - getattr(cache[0], "prefix_length", 0)]


def save(file: Path, model: Model, cache: list, tokens: list[int]) -> None:
    """Write caches and their tokens to a safetensors file, whole or not at all.

    Raises:
        OSError: the file cannot be written.
    """
    metadata = {TOKENS: json.dumps(tokens), MODEL: _signature(model)}
    handle, name = tempfile.mkstemp(dir=file.parent, prefix=file.name, suffix=".safetensors")
    os.close(handle)
    try:
        save_prompt_cache(name, cache, metadata)
        Path(name).replace(file)
    finally:
        Path(name).unlink(missing_ok=True)


def load(file: Path, model: Model) -> tuple[list, list[int]]:
    """Read what ``save`` wrote.

    Raises:
        ValueError: the file is not a prompt cache, or was made with another model.
    """
    try:
        cache, metadata = load_prompt_cache(str(file), return_metadata=True)
        tokens, signature = json.loads(metadata[TOKENS]), metadata[MODEL]
    except (RuntimeError, ValueError, KeyError, TypeError, IndexError) as error:
        raise ValueError(f"{file}: not a prompt cache that parscale saved") from error
    if signature != _signature(model):
        raise ValueError(f"{file}: this prompt cache was made with another model")
    return cache, tokens


def _signature(model: Model) -> str:
    # The first tokens' embeddings tell apart two models of one architecture, and the first
    # layer's prefixes two adapters over one backbone.
    probes = [model.model.embed_tokens(mx.arange(8)).sum(axis=-1)]
    if model.args.prefix_length:
        probes.append(model.layers[0].self_attn.prefix_k.sum(axis=(1, 2, 3)))
    probe: Any = mx.concatenate(probes).tolist()
    fields = {k: v for k, v in sorted(vars(model.args).items()) if not isinstance(v, dict)}
    return json.dumps([fields, [round(float(x), 3) for x in probe]])
