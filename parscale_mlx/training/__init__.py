"""Training: an ordinary decoder, then streams over it (the paper's two stages)."""

from parscale_mlx.training.loop import TrainResult, resume, train

from parscale_core.train_settings import TrainSettings

__all__ = ["TrainResult", "TrainSettings", "resume", "train"]
