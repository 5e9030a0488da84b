"""What ``parscale bench`` reports: timings, set against counts and against the machine."""

import io
import time
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass, replace
from typing import Any

from parscale_mlx import machine
from parscale_mlx.benchmark.models import SMOLLM2, Backbone, compared_models
from parscale_mlx.benchmark.timing import Timing, measure, mlx_side
from parscale_mlx.model import Model

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.utils import quantize_model
from parscale_core.analysis.roofline import Work, step
from parscale_core.analysis.shape import Precision, Shape, precision_of, shape_of
from parscale_core.progress import progress_bar


@dataclass(frozen=True)
class Plan:
    """What is measured of a model; each list makes rows of its own.

    Attributes:
        batch: sequences at once.
        prompt: tokens of the prompts.
        quantisations: bits of the weights, "none" for as they are.
        group_size: weights that share a scale there.
        tokens: generated after the first.
        repeats: measured turns of each side.
        cpu_time: measure the processor's time, not the clock's.
    """

    streams: Sequence[int]
    batch: Sequence[int]
    prompt: Sequence[int]
    quantisations: Sequence[str]
    group_size: int
    tokens: int
    repeats: int
    cpu_time: bool


def measure_machine(*, cpu_time: bool) -> dict[str, Any]:
    """The device's name, its memory bandwidth and its matrix products, in units a second.

    Args:
        cpu_time: units a second of one core.
    """
    clock = _clock(cpu_time)
    return {
        "name": machine.device_name(),
        "bandwidth": machine.measure_bandwidth(clock),
        "flops": {
            "float32": machine.measure_flops(mx.float32, clock),
            "float16": machine.measure_flops(mx.float16, clock),
        },
    }


def measure_all(rates: dict[str, Any], backbone: Backbone, plan: Plan) -> list[dict[str, Any]]:
    """One row for each quantisation, batch size, prompt length and side, as plain data.

    Args:
        rates: what ``measure_machine`` gives.

    Raises:
        FileNotFoundError, ValueError: as ``Backbone.load``; or the model is quantised already.
    """
    rows = []
    cases = [(b, length) for b in plan.batch for length in plan.prompt]
    turns = len(plan.quantisations) * len(cases) * (len(plan.streams) + 1) * (plan.repeats + 1)
    with progress_bar("measuring", turns, "turn") as bar:
        for bits in plan.quantisations:
            plain, config, adapters = backbone.load(SMOLLM2)
            if bits != "none":
                plain, config = _quantise(plain, config, int(bits), plan.group_size)
            models = compared_models(plain, config, plan.streams, adapters)
            for b, length in cases:
                ids = mx.random.randint(0, plain.args.vocab_size, (b, length))
                timings = measure(
                    {name: mlx_side(model, ids) for name, model in models.items()},
                    repeats=plan.repeats,
                    tokens=plan.tokens,
                    clock=_clock(plan.cpu_time),
                    turn_done=bar.update,
                )
                for name, timing in timings.items():
                    shape, precision = _counted(config, plain, models[name])
                    case = {"weights": _weights(config, precision), "batch": b, "prompt": length}
                    case |= {"side": name, "streams": shape.streams} | asdict(timing)
                    case |= _rates(case, timings["mlx-lm"])
                    rows.append(case | _shares(case, rates, shape, precision, plan.tokens))
    return rows


def _clock(cpu_time: bool) -> Callable[[], float]:
    return time.process_time if cpu_time else time.perf_counter


def _quantise(
    model: Model, config: dict[str, Any], bits: int, group: int
) -> tuple[Model, dict[str, Any]]:
    if "quantization" in config:
        raise ValueError("--quantize: the model is quantised already")
    with redirect_stdout(io.StringIO()):  # mlx-lm prints the bits per weight
        _, config = quantize_model(model, config, group, bits)  # in place
    return model, config


def _counted(config: dict[str, Any], backbone: Model, model: nn.Module) -> tuple[Shape, Precision]:
    """What is counted for a side: its shape, and its precision as it was loaded."""
    others = 32 if backbone.model.norm.weight.dtype == mx.float32 else 16
    args = getattr(model, "args", None)
    prefix = getattr(args, "prefix_length", 0)
    streams = getattr(args, "streams", 1)
    shape = replace(shape_of(config), streams=streams, prefix=prefix, prefix_alone=prefix > 0)
    packed = precision_of(config)
    weights = packed.weights if "quantization" in config else others
    return shape, Precision(weights, others, others, packed.group)


def _weights(config: dict[str, Any], precision: Precision) -> str:
    return f"{precision.weights} bit" if "quantization" in config else f"float{precision.others}"


def _rates(case: dict[str, Any], base: Timing) -> dict[str, Any]:
    """Tokens a second, and how many times as long as mlx-lm's own class it takes."""
    return {
        "prefill_rate": case["batch"] * case["prompt"] / case["first_token"],
        "decode_rate": case["batch"] / case["step"],
        "first_token_times": case["first_token"] / base.first_token,
        "step_times": case["step"] / base.step,
    }


def _shares(
    case: dict[str, Any], rates: dict[str, Any], shape: Shape, precision: Precision, tokens: int
) -> dict[str, Any]:
    """What a prefill and a step amount to, and how much of the machine's rates that reaches."""
    batch, length = case["batch"], case["prompt"]
    prefill = _total(shape, precision, batch=batch, tokens=length, past=0)
    decode = _total(shape, precision, batch=batch, tokens=1, past=length + tokens / 2)
    flops = rates["flops"][f"float{precision.others}"]
    return {
        "prefill_flops": prefill.flops,
        "step_flops": decode.flops,
        "step_bytes": decode.bytes,
        "compute_share": prefill.flops / case["first_token"] / flops,
        "bandwidth_share": decode.bytes / case["step"] / rates["bandwidth"],
    }


def _total(shape: Shape, precision: Precision, **lengths: Any) -> Work:
    parts = step(shape, precision, **lengths).values()
    return Work(sum(w.flops for w in parts), sum(w.bytes for w in parts))
