"""One model over several processes that MLX connects: who runs what, and what they exchange."""
