"""Give a plain model P streams, as a place for training to start from.

Each stream's prefix is what the model itself would hold in its KV cache after reading a piece of
real text, a different piece for each stream; the aggregator starts by weighing all streams alike.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import exp
from typing import Any

from parscale_mlx.cross_entropy import cross_entropy
from parscale_mlx.model import Aggregator, Model, rotate

import mlx.core as mx
from mlx.utils import tree_map
from parscale_core.checkpoint.config import MAX_STREAMS, ModelConfig, family_of

# The published class is Qwen2's; those of the other families are named after it.
ARCHITECTURES = {
    "qwen2": "Qwen2ParScaleForCausalLM",
    "qwen3": "Qwen3ParScaleForCausalLM",
    "llama": "LlamaParScaleForCausalLM",
    "mistral": "MistralParScaleForCausalLM",
    "smollm3": "SmolLM3ParScaleForCausalLM",
    "granite": "GraniteParScaleForCausalLM",
}
WINDOW, WINDOWS = 256, 4  # tokens a window, and windows, of the text that perplexity is taken of


@dataclass
class Pieces:
    """Token ids of a text: what the prefixes are made from, and what was held out."""

    prefixes: mx.array  # [P, prefix_length]
    held_out: mx.array  # [windows, L]


def default_text() -> str:
    """English prose that ships with Python: the topics of its ``help()``.

    Raises:
        ValueError: this Python came without them.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise ValueError(
            "this Python has no pydoc_data; give a text of your own (`text`)"
        ) from error
    return "\n\n".join(topics[name] for name in sorted(topics))


def cut_pieces(tokenizer: Any, text: str, *, streams: int, prefix_length: int) -> Pieces:
    """Cut a text into one piece for each stream, evenly spaced, and held-out windows at its end.

    Every piece starts as the tokenizer starts a text: with its beginning-of-text token, if any.

    Raises:
        ValueError: the text is too short.
    """
    start = tokenizer.encode("")
    ids = tokenizer.encode(text)[len(start) :]
    room = len(ids) - streams * prefix_length
    window = min(WINDOW, room // WINDOWS)
    if window < 16:
        raise ValueError(
            f"the text has {len(ids)} tokens; {streams} prefixes of {prefix_length} and what is "
            f"held out need {streams * prefix_length + 16 * WINDOWS}"
        )
    held_out = ids[-window * WINDOWS :]
    step = (len(ids) - len(held_out)) // streams
    prefixes = [(start + ids[n * step :])[:prefix_length] for n in range(streams)]
    windows = [held_out[n * window : (n + 1) * window] for n in range(WINDOWS)]
    return Pieces(mx.array(prefixes), mx.array([start + w for w in windows]))


def grafted_config(config: dict[str, Any], *, streams: int, prefix_length: int) -> dict[str, Any]:
    """The ``config.json`` of a plain model after it was given streams.

    Raises:
        ValueError: it has streams already, or the numbers are out of range.
    """
    if not 1 <= streams <= MAX_STREAMS:
        raise ValueError(f"{streams} streams: not a number from 1 to {MAX_STREAMS}")
    if prefix_length < 1:
        raise ValueError(f"a prefix of {prefix_length} tokens: not at least 1")
    if config.get("parscale_n", 1) > 1:
        raise ValueError(f"the model already has {config['parscale_n']} streams")
    if config.get("parscale_prefix"):
        raise ValueError("the model already has a prefix")
    family = family_of(config["model_type"])
    return (
        config
        | {
            "model_type": f"{family}_parscale",
            "architectures": [ARCHITECTURES[family]],
            "parscale_n": streams,
            "parscale_n_tokens": prefix_length,
            "parscale_attn_smooth": config.get("parscale_attn_smooth", 0.01),
        }
        | ({"parscale_prefix": True} if streams == 1 else {})
    )


def make_prefixes(model: Model, pieces: mx.array) -> list[tuple[mx.array, mx.array]]:
    """For each layer of a plain model, its keys and values over ``pieces`` [P, prefix_length].

    A prefix key takes no rotary embedding: a model with streams rotates all of them by the prefix's
    length. So key i, which the cache holds rotated by i, is stored rotated by i - prefix_length.

    Returns:
        Keys and values, [P, kv_heads, prefix_length, head_dim] each.
    """
    caches = model.make_cache()
    model.model(pieces, caches)
    prefixes = []
    for layer, cache in zip(model.layers, caches, strict=True):
        n = cache.offset
        keys, values = cache.keys[..., :n, :], cache.values[..., :n, :]
        prefixes.append((rotate(layer.self_attn.rope, keys, -n), values))
    mx.eval(prefixes)
    return prefixes


def graft(model: Model, config: dict[str, Any], prefixes: list[tuple[mx.array, mx.array]]) -> None:
    """Turn a plain model into one with streams, in place.

    Args:
        config: that of ``grafted_config``.
        prefixes: those of ``make_prefixes``, which are cast to the model's type.
    """
    args = ModelConfig.from_dict(config)
    dtype = model.model.norm.weight.dtype
    for layer, (keys, values) in zip(model.layers, prefixes, strict=True):
        layer.self_attn.prefix_k = keys.astype(dtype)
        layer.self_attn.prefix_v = values.astype(dtype)
    if args.streams > 1:
        model.model.aggregator = _even_aggregator(args, config, dtype)
    model.model.n_streams = args.streams
    model.args, model.model_type = args, args.model_type


def perplexity(
    model: Model, windows: mx.array, on_window: Callable[[], object] = lambda: None
) -> float:
    """exp of the mean cross-entropy of the tokens in the second half of each window [n, L].

    A prefix is a context, and any context helps where a text begins. What is wanted is whether it
    disturbs the model, so tokens are only counted where the window itself gives them a context.
    """
    half = windows.shape[1] // 2
    total = 0.0
    for window in windows:
        logits = model(window[None, :-1])[0, half:]
        total += float(cross_entropy(logits, window[half + 1 :]).mean())
        on_window()
    return exp(total / len(windows))


def _even_aggregator(args: ModelConfig, config: dict[str, Any], dtype: mx.Dtype) -> Aggregator:
    # With nothing in its last layer the aggregator gives all streams the same weight, and yet it
    # has gradients to learn from, since the first layer is not empty.
    aggregator = Aggregator(args)
    aggregator.fc1.weight = mx.random.normal(
        aggregator.fc1.weight.shape,
        scale=config.get("initializer_range", 0.02),
        key=mx.random.key(0),
    )
    aggregator.fc1.bias = mx.zeros_like(aggregator.fc1.bias)
    aggregator.fc2.update(tree_map(mx.zeros_like, aggregator.fc2.parameters()))
    aggregator.set_dtype(dtype)
    return aggregator
