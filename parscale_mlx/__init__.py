"""ParScale language models in MLX: load, generate, convert.

>>> from parscale_mlx import load, generate
>>> model, tokenizer = load("ParScale/ParScale-1.8B-P8-Inst")
>>> generate(model, tokenizer, "Why is the sky blue?", max_tokens=100)
"""

from parscale_mlx.blas import preload

preload()

from parscale_mlx.adapter import load_adapter, with_streams  # noqa: E402
from parscale_mlx.generation import batch_generate, generate, stream_generate  # noqa: E402
from parscale_mlx.load import load, load_model  # noqa: E402
from parscale_mlx.model import Model  # noqa: E402

__all__ = [
    "Model",
    "batch_generate",
    "generate",
    "load",
    "load_adapter",
    "load_model",
    "stream_generate",
    "with_streams",
]
