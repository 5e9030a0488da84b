"""The measurements of ``parscale bench``, set against counts and against the machine."""

import io
import time
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from dataclasses import asdict, replace
from pathlib import Path

from parscale_mlx import benchmark, machine
from parscale_mlx.adapter import Adapter, load_adapter
from parscale_mlx.load import load_model
from parscale_mlx.model import Model

import mlx.core as mx
from mlx_lm.utils import quantize_model
from parscale_core.analysis.roofline import Work, step
from parscale_core.analysis.shape import Precision, Shape, precision_of, read_config, shape_of
from parscale_core.checkpoint.folder import find_folder
from parscale_core.progress import hidden
from tqdm import tqdm


def measure_machine(*, cpu_time: bool) -> dict:
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


def measure_all(
    rates: dict,
    backbone: tuple[str | None, Path | None, Sequence[Path]],
    quantisations: Sequence[str],
    *,
    streams: Sequence[int],
    batch: Sequence[int],
    prompt: Sequence[int],
    tokens: int,
    repeats: int,
    group_size: int,
    cpu_time: bool,
) -> list[dict]:
    """One row for each quantisation, batch size, prompt length and side, as plain data.

    Args:
        rates: what ``measure_machine`` gives.
        backbone: a model's folder or name, or else a config.json, and the model's adapters.

    Raises:
        FileNotFoundError, ValueError: as ``load_model``, and ``load_adapter``.
    """
    rows = []
    turns = len(quantisations) * len(batch) * len(prompt) * (len(streams) + 1) * (repeats + 1)
    with tqdm(total=turns, desc="measuring", disable=hidden(), leave=False) as bar:
        for bits in quantisations:
            plain, config, adapters = load_backbone(*backbone)
            if bits != "none":
                plain, config = _quantise(plain, config, int(bits), group_size)
            models = benchmark.compared_models(plain, config, streams, adapters)
            for b, length in ((b, length) for b in batch for length in prompt):
                ids = mx.random.randint(0, plain.args.vocab_size, (b, length))
                timings = benchmark.measure(
                    {name: benchmark.mlx_side(model, ids) for name, model in models.items()},
                    repeats=repeats,
                    tokens=tokens,
                    clock=_clock(cpu_time),
                    turn_done=bar.update,
                )
                for name, timing in timings.items():
                    shape, precision = _counted(config, plain, models[name])
                    case = {"weights": _weights(config, precision), "batch": b, "prompt": length}
                    case |= {"side": name, "streams": shape.streams} | asdict(timing)
                    case |= _rates(case, timings["mlx-lm"])
                    rows.append(case | _shares(case, rates, shape, precision, tokens))
    return rows


def _clock(cpu_time: bool) -> Callable[[], float]:
    return time.process_time if cpu_time else time.perf_counter


def load_backbone(
    model: str | None,
    shape: Path | None,
    adapters: Sequence[Path],
    *,
    default: dict = benchmark.SMOLLM2,
) -> tuple[Model, dict, dict[int, Adapter]]:
    """A backbone, its configuration, and its streams by their number.

    Args:
        default: the configuration of random weights where neither a model nor a shape is given.
    """
    if model is None:
        config = default if shape is None else read_config(shape)
        return benchmark.random_backbone(config), config, {}
    folder = find_folder(model)
    loaded, config = load_model(folder)
    backbone, own = benchmark.split(loaded, config)
    found = [load_adapter(path, backbone=folder) for path in adapters]
    return backbone, config, {a.streams: a for a in (*found, own) if a is not None}


def _quantise(model: Model, config: dict, bits: int, group: int) -> tuple[Model, dict]:
    if "quantization" in config:
        raise ValueError("--quantize: the model is quantised already")
    with redirect_stdout(io.StringIO()):  # mlx-lm prints the bits per weight
        _, config = quantize_model(model, config, group, bits)  # in place
    return model, config


def _counted(config: dict, backbone: Model, model) -> tuple[Shape, Precision]:
    """What is counted for a side: its shape, and its precision as it was loaded."""
    others = 32 if backbone.model.norm.weight.dtype == mx.float32 else 16
    args = getattr(model, "args", None)
    prefix = getattr(args, "prefix_length", 0)
    streams = getattr(args, "streams", 1)
    shape = replace(shape_of(config), streams=streams, prefix=prefix, prefix_alone=prefix > 0)
    packed = precision_of(config)
    weights = packed.weights if "quantization" in config else others
    return shape, Precision(weights, others, others, packed.group)


def _weights(config: dict, precision: Precision) -> str:
    return f"{precision.weights} bit" if "quantization" in config else f"float{precision.others}"


def _rates(case: dict, base: benchmark.Timing) -> dict:
    """Tokens a second, and how many times as long as mlx-lm's own class it takes."""
    return {
        "prefill_rate": case["batch"] * case["prompt"] / case["first_token"],
        "decode_rate": case["batch"] / case["step"],
        "first_token_times": case["first_token"] / base.first_token,
        "step_times": case["step"] / base.step,
    }


def _shares(case: dict, rates: dict, shape: Shape, precision: Precision, tokens: int) -> dict:
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


def _total(shape: Shape, precision: Precision, **lengths) -> Work:
    parts = step(shape, precision, **lengths).values()
    return Work(sum(w.flops for w in parts), sum(w.bytes for w in parts))
