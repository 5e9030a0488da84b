"""A model folder that mlx-lm's own commands read: the model's code lies beside the weights.

``qwen2_parscale.py`` is never imported here. It is what mlx-lm calls a custom model file, which it
runs where it is told to trust the folder, and imports nothing but mlx and mlx-lm.
"""

import json
import shutil
from pathlib import Path

from parscale_core.checkpoint.config import family_of

MODEL_FILE = "qwen2_parscale.py"
# What mlx-lm's rotary embeddings compute as transformers does.
ROPE_TYPES = ("default", "linear", "llama3")
FAMILIES = ("qwen2", "qwen3", "llama", "mistral")


def check_model_file(config: dict) -> None:
    """Whether the model file computes what a configuration says.

    Raises:
        ValueError: it is of another family, or its rotary embedding is of a type that mlx-lm
            computes otherwise.
    """
    if family_of(config["model_type"]) not in FAMILIES:
        raise ValueError(
            f"model_type {config['model_type']!r}: a model file is written for "
            f"{', '.join(FAMILIES)}"
        )
    scaling = config.get("rope_scaling") or config.get("rope_parameters") or {}
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    if kind not in ROPE_TYPES:
        raise ValueError(
            f"rope_scaling type {kind!r}: mlx-lm computes it in another way; a model file is "
            f"written for {', '.join(ROPE_TYPES)}"
        )


def add_model_file(folder: Path) -> None:
    """Put the model file into a folder and name it in ``config.json``, as mlx-lm wants it."""
    config_file = folder / "config.json"
    config = json.loads(config_file.read_text(encoding="utf-8"))
    shutil.copyfile(Path(__file__).with_name(MODEL_FILE), folder / MODEL_FILE)
    config["model_file"] = MODEL_FILE
    config_file.write_text(json.dumps(config, indent=4, ensure_ascii=False), encoding="utf-8")
