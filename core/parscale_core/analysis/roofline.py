"""Bytes, operations and time of inference, counted from a decoder's shape.

A step is a sum of parts, each of which takes as long as its arithmetic or its traffic, whichever is
longer. The counts are of what has to be done: every weight is read once a step, the KV cache is
read once and its new entries written, a matrix product's inputs are read and its outputs written.
"""

from dataclasses import dataclass

from parscale_core.analysis.devices import Device
from parscale_core.analysis.shape import Precision, Shape


@dataclass(frozen=True)
class Work:
    """Floating-point operations and bytes of memory traffic."""

    flops: float
    bytes: float


@dataclass(frozen=True)
class Machine:
    """A device with the shares of its peaks that programs reach."""

    device: Device
    compute_share: float = 1.0
    bandwidth_share: float = 1.0

    def seconds(self, parts: dict[str, Work], bits: int) -> float:
        """How long a step takes: the roofline, part by part."""
        return sum(max(self._times(work, bits)) for work in parts.values())

    def bound(self, work: Work, bits: int) -> str:
        """What a part waits for: "compute" or "memory"."""
        compute, memory = self._times(work, bits)
        return "compute" if compute > memory else "memory"

    def _times(self, work: Work, bits: int) -> tuple[float, float]:
        return (
            work.flops / (self.device.flops(bits) * self.compute_share),
            work.bytes / (self.device.bandwidth * self.bandwidth_share),
        )


@dataclass(frozen=True)
class Cost:
    """What an answer costs.

    Attributes:
        memory: bytes at the peak: weights, the full KV cache, the activations of the prefill.
        prefill: seconds to the first token.
        per_token: seconds of a decoding step, on average.
        answer: seconds from the prompt to the last token.
    """

    memory: float
    prefill: float
    per_token: float
    answer: float


def step(
    shape: Shape, precision: Precision, *, batch: int, tokens: int, past: float
) -> dict[str, Work]:
    """The parts of one forward pass that ends in the logits of each sequence's last token.

    Args:
        tokens: new tokens of each sequence.
        past: tokens that the cache holds of each already, the prefix not counted.
    """
    d, other = shape.hidden, precision.other_bytes
    rows = batch * shape.streams * tokens
    matrices, vectors = shape.matrices(), shape.vectors()

    def product(parameters: float, bytes_each: float, rows: float, numbers: float) -> Work:
        return Work(2 * rows * parameters, parameters * bytes_each + rows * numbers * other)

    per_layer = shape.layers
    projections = product(
        matrices["attention"],
        precision.weight_bytes,
        rows,
        per_layer * (2 * d + 2 * shape.query_width + shape.kv_width),
    )
    mlp = product(
        matrices["mlp"],
        precision.weight_bytes,
        rows,
        per_layer * (2 * d + 3 * shape.intermediate),
    )
    # A token sees the past and, on average, half of the new ones.
    seen = shape.prefix_positions + past + (tokens + 1) / 2
    cache = precision.cache_bytes * per_layer * batch * shape.streams * shape.kv_width
    attention = Work(
        4 * rows * seen * shape.query_width * per_layer,
        cache * (shape.prefix_positions + past + 2 * tokens)
        + 2 * rows * shape.query_width * per_layer * other,
    )
    norms = Work(
        0, (vectors["norms"] + vectors["biases"]) * other + 2 * rows * d * other * 2 * per_layer
    )
    parts = {
        "projections": projections,
        "attention": attention,
        "mlp": mlp,
        "norms": norms,
        "head": product(shape.vocabulary * d, precision.weight_bytes, batch, d + shape.vocabulary),
    }
    if shape.streams > 1:
        width = shape.streams * d
        # Every token is weighed, though the logits of the last alone are wanted.
        parts["aggregator"] = product(
            vectors["aggregator"], other, batch * tokens, 2 * width + 2 * d
        )
    return parts


def activation_bytes(shape: Shape, precision: Precision, *, batch: int, tokens: int) -> float:
    """Bytes of what the widest part of a layer holds at once, or of the logits."""
    rows = batch * shape.streams * tokens
    mlp = 2 * shape.hidden + 2 * shape.intermediate
    attention = 2 * shape.hidden + 2 * shape.query_width + shape.kv_width
    logits = batch * (shape.vocabulary + shape.hidden)
    return max(rows * max(mlp, attention), logits) * precision.other_bytes


def cost(
    shape: Shape, precision: Precision, machine: Machine, *, batch: int, prompt: int, answer: int
) -> Cost:
    """The cost of answering ``batch`` prompts at once, ``answer`` tokens each."""
    prefill = machine.seconds(
        step(shape, precision, batch=batch, tokens=prompt, past=0), precision.others
    )
    # A step's time grows in proportion to the past, so the middle step is the average one.
    middle = step(shape, precision, batch=batch, tokens=1, past=prompt + (answer - 2) / 2)
    per_token = machine.seconds(middle, precision.others)
    memory = (
        shape.weight_bytes(precision)
        + shape.cache_bytes(precision, batch=batch, tokens=prompt + answer - 1)
        + activation_bytes(shape, precision, batch=batch, tokens=prompt)
    )
    return Cost(memory, prefill, per_token, prefill + (answer - 1) * per_token)
