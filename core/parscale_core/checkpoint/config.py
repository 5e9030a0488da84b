"""A model's ``config.json``: read once, checked once, for every engine."""

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from parscale_core.checkpoint.links import check_link
from parscale_core.checkpoint.rope import Rope, finite, positive

FAMILIES = ("qwen2", "qwen3", "llama", "mistral", "smollm3", "granite")
MODEL_TYPES = tuple(name for family in FAMILIES for name in (family, f"{family}_parscale"))
MAX_STREAMS = 64
MAX_HEAD_DIM, MAX_LAYERS = 4096, 10_000
MAX_CONTEXT = 1 << 22  # more than any published model's
# What a config.json that leaves a field out means, as transformers reads it.
CONTEXTS = {
    "qwen2": 32768, "qwen3": 32768, "llama": 2048, "mistral": 131072, "smollm3": 32768,
    "granite": 2048,
}  # fmt: skip
MISTRAL_WINDOW, QWEN3_HEAD_DIM, SMOLLM3_THETA = 4096, 128, 2e6


@dataclass(frozen=True)
class ModelConfig:
    """A decoder's dimensions, named as in ``config.json`` but for its streams.

    Attributes:
        streams, prefix_length, smoothing: ``parscale_n``, ``parscale_n_tokens`` and
            ``parscale_attn_smooth`` there. The prefix of one stream is 0 tokens long, whatever
            ``parscale_n_tokens`` says, unless ``parscale_prefix`` is true.
        rope: the rotary embedding; ``rope_traditional`` pairs neighbouring dimensions, as MLX does.
        rotated_layers: whether each layer has a rotary embedding (SmolLM3: three of four).
        qk_norm: each head's queries and keys are normalised before they are rotated (Qwen3).
        attention_scale: what scores are multiplied with.
        embedding_scale, residual_scale, logits_scale: what embeddings, a layer's two results
            before they are added, and logits are multiplied with (Granite; 1 elsewhere).
        raw: the file as it stands.
    """

    model_type: str
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    rms_norm_eps: float
    max_position_embeddings: int
    rope: Rope
    rope_traditional: bool
    rotated_layers: tuple[bool, ...]
    qk_norm: bool
    attention_scale: float
    embedding_scale: float
    residual_scale: float
    logits_scale: float
    tie_word_embeddings: bool
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    streams: int
    prefix_length: int
    smoothing: float
    raw: dict[str, Any] = field(repr=False, compare=False)

    @property
    def family(self) -> str:
        """The model type without its streams, one of ``FAMILIES``."""
        return family_of(self.model_type)

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> "ModelConfig":
        """Read and check the contents of a ``config.json``.

        Raises:
            ValueError: it describes a model that cannot be built; the message names the field.
        """
        model_type = raw.get("model_type")
        if model_type not in MODEL_TYPES:
            raise ValueError(f"model_type {model_type!r} is not one of {', '.join(MODEL_TYPES)}")
        if raw.get("hidden_act", "silu") not in ("silu", "swish"):
            raise ValueError(f"hidden_act {raw['hidden_act']!r} is not supported, only 'silu'")
        if _flag(raw, "use_sliding_window"):
            raise ValueError("use_sliding_window true is not supported, only full attention")
        kinds = raw.get("layer_types")
        if kinds is not None and (
            not isinstance(kinds, list) or any(kind != "full_attention" for kind in kinds)
        ):
            raise ValueError("layer_types other than full_attention are not supported")
        if kinds is not None and len(kinds) != raw.get("num_hidden_layers"):
            raise ValueError(
                f"layer_types are {len(kinds)}, and num_hidden_layers is "
                f"{raw.get('num_hidden_layers')}"
            )
        family = family_of(model_type)
        is_qwen2 = family == "qwen2"
        # Qwen2 has biases on its queries, keys and values whatever config.json says.
        qkv_bias = is_qwen2 or (family != "mistral" and _flag(raw, "attention_bias"))
        heads, hidden = _positive(raw, "num_attention_heads"), _positive(raw, "hidden_size")
        kv_heads = _positive(raw, "num_key_value_heads", heads)
        if heads % kv_heads:
            raise ValueError(
                f"num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}"
            )
        usual = QWEN3_HEAD_DIM if family == "qwen3" else max(hidden // heads, 1)
        head_dim = _positive(raw, "head_dim", usual)
        if head_dim > MAX_HEAD_DIM:
            raise ValueError(f"head_dim {head_dim} is more than {MAX_HEAD_DIM}")
        if head_dim % 2:
            raise ValueError(f"head_dim {head_dim} is odd: rotary embedding needs pairs")
        context = _positive(raw, "max_position_embeddings", CONTEXTS[family])
        if context > MAX_CONTEXT:
            raise ValueError(f"max_position_embeddings {context} is more than {MAX_CONTEXT}")
        if family == "mistral":
            _check_window(raw.get("sliding_window", MISTRAL_WINDOW), context)
        defaults = {"rope_theta": SMOLLM3_THETA, "tie_word_embeddings": True}
        filled = (defaults if family == "smollm3" else {}) | raw
        layers = _positive(raw, "num_hidden_layers")
        if layers > MAX_LAYERS:
            raise ValueError(f"num_hidden_layers {layers} is more than {MAX_LAYERS}")
        multipliers = raw if family == "granite" else {}
        config = cls(
            model_type=model_type,
            hidden_size=hidden,
            intermediate_size=_positive(raw, "intermediate_size"),
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=head_dim,
            vocab_size=_positive(raw, "vocab_size"),
            rms_norm_eps=positive("rms_norm_eps", raw.get("rms_norm_eps", 1e-6)),
            max_position_embeddings=context,
            rope=Rope.from_config(filled, head_dim=head_dim, context=context),
            rope_traditional=_flag(raw, "rope_traditional"),
            rotated_layers=_rotated_layers(raw if family == "smollm3" else {}, layers),
            qk_norm=family == "qwen3",
            attention_scale=positive(
                "attention_multiplier",
                multipliers.get("attention_multiplier", 1.0) if multipliers else head_dim**-0.5,
            ),
            embedding_scale=_number(multipliers, "embedding_multiplier", 1.0),
            residual_scale=_number(multipliers, "residual_multiplier", 1.0),
            logits_scale=1 / _nonzero(multipliers, "logits_scaling"),
            tie_word_embeddings=_flag(filled, "tie_word_embeddings"),
            qkv_bias=qkv_bias,
            # Qwen2 has biases on its queries, keys and values only; Llama on all four or none.
            output_bias=qkv_bias and not is_qwen2,
            mlp_bias=family in ("llama", "smollm3", "granite") and _flag(raw, "mlp_bias"),
            streams=raw.get("parscale_n", 1),
            prefix_length=raw.get("parscale_n_tokens", 48),
            smoothing=raw.get("parscale_attn_smooth", 0.01),
            raw=raw,
        )
        check_streams(config.streams, config.prefix_length, config.smoothing)
        has_prefix = raw.get("parscale_prefix", config.streams > 1)
        if not isinstance(has_prefix, bool):
            raise ValueError(f"parscale_prefix {has_prefix!r} is neither true nor false")
        if not has_prefix and config.streams > 1:
            raise ValueError(f"parscale_prefix false cannot go with parscale_n {config.streams}")
        if not has_prefix:
            config = replace(config, prefix_length=0)
        return config


def family_of(model_type: str) -> str:
    """A model type without its streams."""
    return model_type.removesuffix("_parscale")


def read_json(file: Path) -> dict[str, Any]:
    """The object that a JSON file holds.

    Raises:
        ValueError: it is not JSON, or not an object, or a link out of its folder.
    """
    check_link(file)
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: not valid JSON: {error}") from error
    if not isinstance(raw, dict):
        raise ValueError(f"{file}: not a JSON object")
    return raw


def read_config(folder: Path) -> ModelConfig:
    """A model folder's configuration, checked.

    Raises:
        FileNotFoundError: the folder has no ``config.json``.
        ValueError: it is not JSON, or describes a model that cannot be built.
    """
    file = folder / "config.json"
    if not file.is_file():
        raise FileNotFoundError(f"{folder}: no config.json in this folder")
    raw = read_json(file)
    try:
        return ModelConfig.from_dict(raw)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


def check_streams(streams: Any, prefix_length: Any, smoothing: Any) -> None:
    """Check what ``config.json`` or an adapter says of its streams.

    Raises:
        ValueError: a number that no model has.
    """
    if not _is_whole(streams) or not 1 <= streams <= MAX_STREAMS:
        raise ValueError(f"parscale_n {streams!r} is not a number from 1 to {MAX_STREAMS}")
    if not _is_whole(prefix_length) or prefix_length < 1:
        raise ValueError(f"parscale_n_tokens {prefix_length!r} is not at least 1")
    is_number = isinstance(smoothing, int | float) and not isinstance(smoothing, bool)
    if not is_number or not 0 <= smoothing <= 1:
        raise ValueError(f"parscale_attn_smooth {smoothing!r} is not from 0 to 1")


def tensor_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor that a model of this configuration has, by its name in memory, and its shape."""
    d, hidden = config.hidden_size, config.intermediate_size
    q, kv = (n * config.head_dim for n in (config.num_attention_heads, config.num_key_value_heads))
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config.vocab_size, d)}

    def norm(module: str, width: int) -> None:
        shapes[f"{module}.weight"] = (width,)

    def linear(module: str, rows: int, columns: int, bias: bool) -> None:
        shapes[f"{module}.weight"] = (rows, columns)
        if bias:
            shapes[f"{module}.bias"] = (rows,)

    for n in range(config.num_hidden_layers):
        layer = f"model.layers.{n}"
        linear(f"{layer}.self_attn.q_proj", q, d, config.qkv_bias)
        linear(f"{layer}.self_attn.k_proj", kv, d, config.qkv_bias)
        linear(f"{layer}.self_attn.v_proj", kv, d, config.qkv_bias)
        linear(f"{layer}.self_attn.o_proj", d, q, config.output_bias)
        if config.qk_norm:
            norm(f"{layer}.self_attn.q_norm", config.head_dim)
            norm(f"{layer}.self_attn.k_norm", config.head_dim)
        linear(f"{layer}.mlp.gate_proj", hidden, d, config.mlp_bias)
        linear(f"{layer}.mlp.up_proj", hidden, d, config.mlp_bias)
        linear(f"{layer}.mlp.down_proj", d, hidden, config.mlp_bias)
        norm(f"{layer}.input_layernorm", d)
        norm(f"{layer}.post_attention_layernorm", d)
        if config.prefix_length:
            prefix = (config.streams, config.num_key_value_heads, config.prefix_length)
            shapes[f"{layer}.self_attn.prefix_k"] = (*prefix, config.head_dim)
            shapes[f"{layer}.self_attn.prefix_v"] = (*prefix, config.head_dim)
    norm("model.norm", d)
    if config.streams > 1:
        linear("model.aggregator.fc1", d, config.streams * d, True)
        linear("model.aggregator.fc2", config.streams, d, True)
    if not config.tie_word_embeddings:
        linear("lm_head", config.vocab_size, d, False)
    return shapes


def _nonzero(raw: dict[str, Any], name: str) -> float:
    value = _number(raw, name, 1.0)
    if value == 0:
        raise ValueError(f"{name} is 0, where another number is needed")
    return value


def _rotated_layers(raw: dict[str, Any], layers: int) -> tuple[bool, ...]:
    """Which layers have a rotary embedding: SmolLM3's ``no_rope_layers`` says 1 for those."""
    listed = raw.get("no_rope_layers")
    if listed is None:
        every = _positive(raw, "no_rope_layer_interval", 4) if raw else layers + 1
        return tuple(bool((n + 1) % every) for n in range(layers))
    if (
        not isinstance(listed, list)
        or len(listed) != layers
        or any(n not in (0, 1) for n in listed)
    ):
        raise ValueError(f"no_rope_layers is not a list of {layers} numbers, 0 or 1")
    return tuple(map(bool, listed))


def _check_window(window: Any, context: int) -> None:
    if window is not None and (not _is_whole(window) or window < context):
        raise ValueError(
            f"sliding_window {window!r} is less than max_position_embeddings {context}: only full "
            "attention is supported"
        )


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _positive(raw: dict[str, Any], name: str, default: int | None = None) -> int:
    value: Any = raw.get(name)
    if value is None and default is not None:
        value = default
    if not _is_whole(value) or value < 1:
        raise ValueError(f"{name} is {value!r}, where a positive whole number is needed")
    return value


def _flag(raw: dict[str, Any], name: str) -> bool:
    value = raw.get(name)
    if value is not None and not isinstance(value, bool):
        raise ValueError(f"{name} is {value!r}, where true or false is needed")
    return bool(value)


def _number(raw: dict[str, Any], name: str, default: float) -> float:
    value = raw.get(name, default)
    return finite(name, value)
