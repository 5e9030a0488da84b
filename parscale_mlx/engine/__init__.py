"""Generation on MLX: continuous batches over mlx-lm's, one a number of streams."""

from parscale_mlx.engine.engine import MlxEngine
from parscale_mlx.engine.opening import open_engine

from parscale_core.engine import CacheOptions

__all__ = ["CacheOptions", "MlxEngine", "open_engine"]
