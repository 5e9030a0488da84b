"""The price of P streams, beside the price of the larger plain model that reaches the same loss."""

from dataclasses import asdict, replace
from typing import Any

from parscale_core.analysis.law import ScalingLaw
from parscale_core.analysis.roofline import Machine, cost, step
from parscale_core.analysis.shape import Precision, Shape


def price(
    shape: Shape,
    precision: Precision,
    machine: Machine,
    law: ScalingLaw,
    *,
    streams: int,
    batch: int,
    prompt: int,
    answer: int,
) -> dict[str, Any]:
    """One row of a comparison, as plain data.

    Returns:
        ``cost`` of the P streams in bytes and seconds and ``decode``, the parts of a decoding step;
        with P > 1 also ``equal_model``, the larger model and its cost, and ``increase_ratio``: how
        many times the larger model's increase over P=1 exceeds that of the streams.
    """
    lengths = {"batch": batch, "prompt": prompt, "answer": answer}
    plain, ours = replace(shape, streams=1), replace(shape, streams=streams)
    parameters = plain.parameters_outside_embedding()
    priced = cost(ours, precision, machine, **lengths)
    row = {
        "batch": batch,
        "streams": streams,
        "loss": float(law.loss(parameters, streams)),
        "weight_bytes": ours.weight_bytes(precision),
        "cache_bytes": ours.cache_bytes(precision, batch=batch, tokens=prompt + answer - 1),
        "cost": asdict(priced),
        "decode": _parts(ours, precision, machine, batch, prompt + (answer - 2) / 2),
    }
    if streams == 1:
        return row
    base = cost(plain, precision, machine, **lengths)
    equal = float(law.equivalent_parameters(parameters, streams))
    larger = cost(plain.widened(equal), precision, machine, **lengths)
    row["equal_model"] = {"parameters": equal, "cost": asdict(larger)}
    row["increase_ratio"] = {
        "memory": (larger.memory - base.memory) / (priced.memory - base.memory),
        "time": (larger.answer - base.answer) / (priced.answer - base.answer),
    }
    return row


def _parts(
    shape: Shape, precision: Precision, machine: Machine, batch: int, past: float
) -> dict[str, dict[str, Any]]:
    parts = step(shape, precision, batch=batch, tokens=1, past=past)
    return {
        name: asdict(work)
        | {
            "seconds": machine.seconds({name: work}, precision.others),
            "bound": machine.bound(work, precision.others),
        }
        for name, work in parts.items()
    }
