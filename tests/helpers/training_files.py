"""A tiny model with a tokenizer of characters, and text for it."""

import json
from pathlib import Path

import parscale_mlx

import mlx.core as mx
from mlx.utils import tree_flatten
from parscale_core.checkpoint.config import ModelConfig
from tokenizers import Tokenizer, models

CONFIG = {
    # Not qwen2: transformers puts Qwen2's own pre-tokenizer in place of any other.
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 100,
    "max_position_embeddings": 128,
    "tie_word_embeddings": True,
    "eos_token_id": 0,
}
TEMPLATE = (
    "{% for m in messages %}{{ m.role[0] }}: {{ m.content }}~{% endfor %}"
    "{% if add_generation_prompt %}a: {% endif %}"
)
TEXT = "".join(f"Line {n}: streams differ by what they have read before.\n" for n in range(60))


def write_config(folder: Path, template: str | None = TEMPLATE, **changes) -> Path:
    """A configuration and a tokenizer, without weights."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG | changes))
    characters = ["<end>", "<unk>", "\n", *map(chr, range(32, 127))]
    vocabulary = {c: n for n, c in enumerate(characters)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>"))
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<end>"}
    settings |= {"chat_template": template} if template else {}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def write_model(folder: Path, **changes) -> Path:
    """A plain model of random weights."""
    write_config(folder, **changes)
    mx.random.seed(5)
    args = ModelConfig.from_dict(CONFIG | changes)
    weights = dict(tree_flatten(parscale_mlx.Model(args).parameters()))
    mx.save_safetensors(str(folder / "model.safetensors"), weights)
    return folder
