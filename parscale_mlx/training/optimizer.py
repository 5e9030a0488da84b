"""AdamW with warm-up and cosine decay; rates and decay of their own for the kinds of weights."""

from typing import Any

from parscale_mlx.adapter import is_stream_parameter
from parscale_mlx.model import Model
from parscale_mlx.training.settings import TrainSettings

import mlx.core as mx
import mlx.optimizers as optim
from mlx_lm.tuner.utils import build_schedule

BETAS = [0.9, 0.95]


def make_optimizer(settings: TrainSettings, model: Model) -> optim.MultiOptimizer:
    """The optimizer of a run, initialised for the model's trainable parameters.

    Only matrices are decayed. Prefixes are not: one of zeros is no nearer to doing nothing.
    """
    streams_lr = settings.lr if settings.streams_lr is None else settings.streams_lr
    groups: list[tuple[Any, float, float]] = [
        (_is_decayed_stream, streams_lr, settings.weight_decay),
        (_is_stream, streams_lr, 0.0),
        (_is_decayed, settings.lr, settings.weight_decay),
        (None, settings.lr, 0.0),
    ]
    optimizers = [_adamw(settings, lr, decay) for _, lr, decay in groups]
    optimizer = optim.MultiOptimizer(optimizers, [belongs for belongs, _, _ in groups[:-1]])
    optimizer.init(model.trainable_parameters())
    return optimizer


def _adamw(settings: TrainSettings, lr: float, decay: float) -> optim.AdamW:
    warmup = settings.steps // 20 if settings.warmup is None else settings.warmup
    schedule = build_schedule(
        {
            "name": "cosine_decay",
            "arguments": [lr, max(1, settings.steps - warmup), lr * settings.final_lr],
            "warmup": warmup,
        }
    )
    return optim.AdamW(schedule, betas=BETAS, weight_decay=decay, bias_correction=True)


def _is_stream(name: str, weight: mx.array) -> bool:
    return is_stream_parameter(name)


def _is_decayed_stream(name: str, weight: mx.array) -> bool:
    return ".aggregator." in name and weight.ndim == 2


def _is_decayed(name: str, weight: mx.array) -> bool:
    return weight.ndim == 2
