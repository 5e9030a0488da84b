"""Which streams spoke, token by token, while mlx-lm generates."""

from typing import Any

from parscale_mlx.model import Model

import mlx.core as mx


class StreamRecorder:
    """Stands in for a model in mlx-lm's generators and keeps the aggregator's weights.

    Args:
        model: the model that computes.
        skip: calls whose weights nobody asks for; those of the prefill, which would otherwise keep
            the whole chunk's graph alive.
    """

    def __init__(self, model: Model, skip: int):
        self.model = model
        self.skip = skip
        self.recorded: list[mx.array] = []

    def __getattr__(self, name):
        return getattr(self.model, name)

    def __call__(self, inputs: mx.array, cache=None) -> mx.array:
        logits, weights = self.model.logits_and_weights(inputs, cache)
        if self.skip:
            self.skip -= 1
        else:
            self.recorded.append(weights[0, -1])
        return logits

    def weights(self, step: int) -> list[float]:
        """The weights of the P streams in the hidden state that gave generated token ``step``."""
        weights: Any = self.recorded[step].tolist()
        return weights
