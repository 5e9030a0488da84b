"""The paper's own accounting of inference cost, and its headline.

arXiv 2505.10475, Section 3.3: against a model with more parameters that reaches the same loss, P=8
on 1.6B parameters needs 22 times less additional memory and 6 times less additional time at batch
size 1. Its numbers come from llm-analysis' formulas, where streams stand in as a larger batch. The
paper does not say how prompt and answer lengths are averaged or on which data losses are equal;
``ASSUMPTIONS`` says what gives the published figures.
"""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from parscale_core.analysis.devices import DEVICES
from parscale_core.analysis.law import PAPER
from parscale_core.analysis.loss_table import PAPER_LOSSES, read_losses
from parscale_core.analysis.roofline import Machine, cost
from parscale_core.analysis.shape import PAPER_SHAPES, Precision, Shape

MACHINE = Machine(DEVICES["a100"], compute_share=0.7, bandwidth_share=0.9)
LENGTHS = (64, 128, 256, 512)
DATASET = "stack-v2-python"
BASE, STREAMS = "1.6B", 8
PUBLISHED = {"memory": 22, "time": 6}
ASSUMPTIONS = (
    "NVIDIA A100 80 GB: 70 % of 312 TFLOP/s, 90 % of 2039 GB/s",
    "weights, activations and cache in 16 bits; embedding and head tied, 151936 tokens",
    "prompts and answers of 64, 128, 256 and 512 tokens, equally long, increases averaged",
    "P streams cost what a batch P times as large does, of prompts 48 tokens longer: the prefix is "
    "computed with every prompt",
    "the whole cache, as long as it will be, is read and written for every token",
    "logits are kept for the whole prompt; activations are of the one widest layer",
    "the aggregator is one matrix, paid once an answer; prefixes are no weights",
    "equal loss by the losses measured on Stack-V2-Python, 1.0383 for P=8 on 1.6B, interpolated "
    "between plain models over the logarithm of their parameters",
)


@dataclass(frozen=True)
class Increase:
    """What is added to the plain model's cost: bytes and seconds."""

    memory: float
    time: float


@dataclass(frozen=True)
class Headline:
    """The increases of either way to the same loss, and the parameters of the larger model."""

    parameters: float
    streams: Increase
    larger: Increase

    def increase_ratio(self) -> dict[str, float]:
        return {
            "memory": self.larger.memory / self.streams.memory,
            "time": self.larger.time / self.streams.time,
        }


def published(batch: int = 1, parameters: float | None = None) -> Headline:
    """The headline by the paper's accounting.

    Args:
        parameters: of the larger model; by default those of equal measured loss.
    """
    return _headline(_published_cost, batch, parameters or equal_loss_parameters())


def counted(batch: int = 1, parameters: float | None = None) -> Headline:
    """The same comparison by this package's own counts."""
    return _headline(_counted_cost, batch, parameters or equal_loss_parameters())


def equal_loss_parameters() -> float:
    """Parameters of the plain model with the measured loss of P=8 on 1.6B."""
    losses = next(x for x in read_losses(PAPER_LOSSES) if x.dataset == DATASET)
    size = losses.parameters[losses.streams == 1]
    plain = losses.loss[losses.streams == 1]
    base = PAPER_SHAPES[BASE].parameters_outside_embedding()
    target = losses.loss[losses.streams == STREAMS][np.flatnonzero(size == base)[0]]
    return float(np.exp(np.interp(-target, -plain, np.log(size))))


def law_parameters() -> float:
    """What the fitted law says instead: it smooths over the measured losses."""
    base = PAPER_SHAPES[BASE].parameters_outside_embedding()
    return float(PAPER[DATASET].equivalent_parameters(base, STREAMS))


def _headline(price: Any, batch: int, parameters: float) -> Headline:
    base = PAPER_SHAPES[BASE]
    larger = base.widened(parameters)
    rows = []
    for length in LENGTHS:
        plain, streams, wide = (
            np.array(price(shape, p, batch, length, length))
            for shape, p in ((base, 1), (base, STREAMS), (larger, 1))
        )
        rows.append([*(streams - plain), *(wide - plain)])
    memory, time, wide_memory, wide_time = np.mean(rows, axis=0).tolist()
    return Headline(parameters, Increase(memory, time), Increase(wide_memory, wide_time))


def _counted_cost(
    shape: Shape, streams: int, batch: int, prompt: int, answer: int
) -> tuple[float, float]:
    total = cost(
        replace(shape, streams=streams),
        Precision(),
        MACHINE,
        batch=batch,
        prompt=prompt,
        answer=answer,
    )
    return total.memory, total.answer


def _published_cost(
    shape: Shape, streams: int, batch: int, prompt: int, answer: int
) -> tuple[float, float]:
    """Bytes and seconds by ``ASSUMPTIONS``; two bytes a number throughout."""
    rows = batch * streams
    prompt_and_prefix = prompt + (shape.prefix if streams > 1 else 0)
    matrices = shape.matrices()
    cache = 2 * rows * (prompt_and_prefix + answer) * shape.layers * shape.kv_width
    aggregator = streams * shape.hidden * (shape.hidden + 1) if streams > 1 else 0
    activations = 2 * max(
        rows * prompt_and_prefix * shape.intermediate, batch * prompt_and_prefix * shape.vocabulary
    )
    weights = 2 * (sum(matrices.values()) + shape.vectors()["norms"])
    memory = weights + cache + 2 * aggregator + activations
    bandwidth = MACHINE.device.bandwidth * MACHINE.bandwidth_share
    time = (
        _published_pass(shape, rows, batch, prompt_and_prefix)
        + answer * (_published_pass(shape, rows, batch, 1) + 2 * cache / bandwidth)
        # The share of the MLP's time that the aggregator has of its parameters.
        + aggregator / matrices["mlp"] * _published_mlp(shape, batch, prompt + answer)
    )
    return memory, time


def _published_pass(shape: Shape, rows: int, batch: int, tokens: int) -> float:
    """Seconds of one forward pass; the head's weights are charged to the embedding."""
    flops, bandwidth = _rates()
    d, n = shape.hidden, rows * tokens
    attention_weights = shape.matrices()["attention"]
    attention = max(
        (2 * n * attention_weights + 4 * n * tokens * d * shape.layers) / flops,
        2 * (attention_weights + 3 * n * d * shape.layers) / bandwidth,
    )
    norms = 2 * shape.layers * 4 * n * d / bandwidth  # in 32 bits
    embedding = 2 * shape.vocabulary * d / bandwidth
    head = 2 * batch * tokens * shape.vocabulary * d / flops
    return attention + _published_mlp(shape, rows, tokens) + norms + embedding + head


def _published_mlp(shape: Shape, rows: int, tokens: int) -> float:
    flops, bandwidth = _rates()
    weights, n = shape.matrices()["mlp"], rows * tokens
    return max(
        2 * n * weights / flops, 2 * (weights + n * shape.intermediate * shape.layers) / bandwidth
    )


def _rates() -> tuple[float, float]:
    device = MACHINE.device
    return device.flops16 * MACHINE.compute_share, device.bandwidth * MACHINE.bandwidth_share
