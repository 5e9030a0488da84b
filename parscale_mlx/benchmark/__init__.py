"""Speed and memory of generation: streams beside mlx-lm's own classes, and beside the machine."""
