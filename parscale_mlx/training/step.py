"""One training step, the held-out loss, and the batches they take."""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

from parscale_mlx.cross_entropy import cross_entropy
from parscale_mlx.model import Model, TransformerBlock
from parscale_mlx.training import batches, data_parallel
from parscale_mlx.training.documents import Document
from parscale_mlx.training.start import Start

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.nn.utils import average_gradients
from mlx.utils import tree_map
from mlx_lm.tuner.trainer import grad_checkpoint
from parscale_core.train_settings import TrainSettings

F = TypeVar("F", bound=Callable[..., Any])
# Tokens [B, L + 1], and which predictions count [B, L].
Batch = tuple[mx.array, mx.array]
# From micro-batches to the summed loss, the count, and the gradients' norm.
Step = Callable[[Iterable[Batch]], tuple[float, float, float]]


def make_step(start: Start, optimizer: optim.Optimizer, clip: float) -> Step:
    """The function of one training step.

    Losses are summed and divided once by how many predictions count in the whole batch, so that
    how it is cut into micro-batches and machines makes no difference.
    """
    model, encoder = start.model, start.encoder
    state = [
        model.state,
        optimizer.state,
        mx.random.state,
        *([] if encoder is None else [encoder.state]),
    ]
    value_and_grad = nn.value_and_grad(model, summed_loss)

    @partial(_compiled, inputs=state, outputs=state)
    def gradients_of(tokens: mx.array, counts: mx.array) -> Any:
        return value_and_grad(model, tokens, counts)

    @partial(_compiled, inputs=state, outputs=state)
    def update(gradients: Any, count: mx.array) -> mx.array:
        scale = data_parallel.size() / count
        gradients = tree_map(lambda g: g * scale, average_gradients(gradients))
        gradients, norm = optim.clip_grad_norm(start.gradients(gradients), clip or math.inf)
        start.update(optimizer.apply_gradients(gradients, start.weights()))
        return norm

    def step(micro_batches: Iterable[Batch]) -> tuple[float, float, float]:
        gradients: Any = None
        loss, count = mx.array(0.0), mx.array(0.0)
        for tokens, counts in micro_batches:
            (part, n), new = gradients_of(tokens, counts)
            loss, count = loss + part, count + n
            gradients = new if gradients is None else tree_map(mx.add, gradients, new)
            mx.eval(loss, count, gradients)
        loss, count = data_parallel.total(loss), data_parallel.total(count)
        norm = update(gradients, mx.maximum(count, 1))
        mx.eval(state, loss, count, norm)
        result: Any = (loss.item(), mx.maximum(count, 1).item(), norm.item())
        return result

    return step


def make_evaluation(model: Model, valid: list[Document], batch_size: int) -> Callable[[], float]:
    """A function that computes the mean loss of the held-out sequences, in nats a token."""
    own = valid[data_parallel.rank() :: data_parallel.size()]

    @partial(_compiled, inputs=[model.state])
    def losses_of(tokens: mx.array, counts: mx.array) -> tuple[mx.array, mx.array]:
        return summed_loss(model, tokens, counts)

    def evaluate() -> float:
        loss, count = mx.array(0.0), mx.array(0.0)
        for n in range(0, len(own), batch_size):
            tokens, counts = batches.make_batch(own[n : n + batch_size])
            part, k = losses_of(mx.array(tokens), mx.array(counts))
            loss, count = loss + part, count + k
            mx.eval(loss, count)
        mean: Any = (data_parallel.total(loss) / data_parallel.total(count)).item()
        return mean

    return evaluate


def micro_batches(settings: TrainSettings, documents: list[Document], step: int) -> Iterator[Batch]:
    size = settings.batch_size
    for n in range(step * settings.accumulate, (step + 1) * settings.accumulate):
        indices = batches.batch_indices(n, size, len(documents), settings.seed)
        own = indices[data_parallel.rank() :: data_parallel.size()]
        tokens, counts = batches.make_batch([documents[i] for i in own])
        yield mx.array(tokens), mx.array(counts)


@contextmanager
def grad_checkpointing(model: Model, wanted: bool) -> Iterator[None]:
    # mlx-lm changes the layers' class; it is put back for whatever else runs in this process.
    call = TransformerBlock.__call__
    if wanted:
        grad_checkpoint(model.layers[0])
    try:
        yield
    finally:
        TransformerBlock.__call__ = call  # type: ignore[method-assign]


def summed_loss(model: Model, tokens: mx.array, counts: mx.array) -> tuple[mx.array, mx.array]:
    """Losses of tokens [B, L + 1], summed where ``counts`` [B, L] says, and how many those are."""
    losses = cross_entropy(model(tokens[:, :-1]), tokens[:, 1:])
    return (losses * counts).sum(), counts.sum()


def _compiled(function: F, **captured: Any) -> F:
    # On the CPU a C++ compiler would be needed, and a minute of its time before the first step.
    if mx.default_device() == mx.cpu:
        return function
    compiled: Any = mx.compile(function, **captured)
    return compiled
