"""AdamW with warm-up and cosine decay; rates and decay of their own for the kinds of weights."""

from collections.abc import Callable

from parscale_mlx.training.prefix_encoder import NAME
from parscale_mlx.training.start import Start

import mlx.core as mx
import mlx.optimizers as optim
from mlx_lm.tuner.utils import build_schedule
from parscale_core.checkpoint.names import is_prefix, is_stream_tensor
from parscale_core.train_settings import TrainSettings

BETAS = [0.9, 0.95]
Belongs = Callable[[str, mx.array], bool]


def make_optimizer(settings: TrainSettings, start: Start) -> optim.MultiOptimizer:
    """The optimizer of a run, initialised for what it trains.

    Only matrices are decayed. Prefixes are not: one of zeros is no nearer to doing nothing.
    """
    streams_lr = settings.lr if settings.streams_lr is None else settings.streams_lr
    aggregator_lr = streams_lr if settings.aggregator_lr is None else settings.aggregator_lr
    # A weight belongs to the first group that it fits.
    streams: list[tuple[Belongs, float, float]] = [
        (lambda name, w: _makes_prefixes(name), streams_lr, 0.0),
        (lambda name, w: _is_streams(name) and _is_matrix(w), aggregator_lr, 1.0),
        (lambda name, w: _is_streams(name), aggregator_lr, 0.0),
    ]
    backbone: list[tuple[Belongs, float, float]] = [
        (lambda name, w: not _is_streams(name) and _is_matrix(w), settings.lr, 1.0),
        (lambda name, w: not _is_streams(name), settings.lr, 0.0),
    ]
    # The first one's learning rate is the one reported.
    groups = backbone + streams if settings.trains_backbone else streams + backbone
    optimizers = [_adamw(settings, lr, decay * settings.weight_decay) for _, lr, decay in groups]
    optimizer = optim.MultiOptimizer(optimizers, [belongs for belongs, _, _ in groups[:-1]])
    optimizer.init(start.weights())
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


def _makes_prefixes(name: str) -> bool:
    return is_prefix(name) or name.startswith(NAME)


def _is_streams(name: str) -> bool:
    return is_stream_tensor(name) or _makes_prefixes(name)


def _is_matrix(weight: mx.array) -> bool:
    return weight.ndim == 2
