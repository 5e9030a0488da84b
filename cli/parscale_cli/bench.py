"""``parscale bench``: how fast streams are here, beside mlx-lm's plain model and the machine."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from parscale_cli.options.command import command, given, heading, option, refuse
from parscale_cli.options.common import FOLDER, check_plot, force_option, json_option, plot_option
from parscale_cli.options.parallel import joined
from parscale_cli.options.types import Modes, OneOf, Whole, WholeNumbers

if TYPE_CHECKING:
    from parscale_mlx.benchmark.models import Backbone

SHARED_P = (8,)
NOT_SHARED = ("batch", "quantisations", "group_size", "cpu_time", "plot", "force")


@command()
@heading("Model")
@option("--model", metavar="DIR|NAME", help="A model folder or a name on the hub.")
@option(
    "--shape",
    metavar="FILE",
    type=click.Path(exists=True, path_type=Path),
    help="Random weights in the shape of this config.json; without --model and --shape, in that "
    "of SmolLM2-135M; with --parallel, of Qwen2.5-0.5B.",
)
@option(
    "--adapter",
    "adapters",
    metavar="DIR",
    multiple=True,
    type=FOLDER,
    help="Stream adapters of --model; where none has the wanted P, streams are random.",
)
@option(
    "--streams",
    type=WholeNumbers("P,P", most=64),
    default="1,2,4,8",
    help="Numbers of streams.  [default: 1,2,4,8; with --parallel, 8]",
)
@option(
    "--quantize",
    "quantisations",
    multiple=True,
    type=click.Choice(["none", "2", "3", "4", "5", "6", "8"]),
    default=("none",),
    help="Bits of the weights, none for as they are. May be given several times.  [default: none]",
)
@option(
    "--group-size",
    type=OneOf(32, 64, 128),
    default=64,
    help="Weights that share a scale, with --quantize.",
)
@heading("Lengths")
@option("--batch", type=WholeNumbers("N,N"), default="1", help="Sequences at once.")
@option("--prompt", type=WholeNumbers("L,L"), default="128", help="Tokens of the prompts.")
@option("--tokens", type=Whole(1), default=32, help="Tokens to generate after the first.")
@heading("Measurement")
@option(
    "--repeats", type=Whole(1), default=5, help="Measured turns of each side; medians are shown."
)
@option(
    "--cpu-time",
    is_flag=True,
    help="Measure the processor's time, all cores added up, not the clock's: where other programs "
    "take the cores. The machine's rates are then those of one core.",
)
@option(
    "--parallel",
    "modes",
    type=Modes(),
    metavar="MODE,MODE",
    help="Measure the model shared by the processes that mlx.launch started, beside the whole of "
    "it on each: streams, tensor or SxT for S shares of the streams by T of the layers.",
)
@plot_option("time to the first token and time per token over P")
@force_option("Replace an existing plot.")
@json_option
@click.pass_context
def bench(ctx, model, shape, adapters, quantisations, modes, plot, force, as_json, **options):
    """Measure generation with P streams beside mlx-lm's own class over the same weights.

    The sides take turns in one run. Bytes moved and operations are counted from the model's
    dimensions, and set against what this machine reaches: reading memory with all cores or the GPU,
    and multiplying large matrices, both measured first.

    With --parallel the sides are the whole model on every process and the ways of sharing it, and
    what is counted is the bytes that each process sends for a token.
    """
    if modes is not None:
        with joined():
            backbone = _backbone(model, shape, adapters)
            refuse(ctx, "cannot go with --parallel", *NOT_SHARED)
            if "streams" not in given(ctx):
                options["streams"] = SHARED_P
            report = _measure_shares(backbone, modes, options)
            click.echo(json.dumps(report)) if as_json else _print_shares(report)
        return
    if quantisations == ("none",):
        refuse(ctx, "needs --quantize", "group_size")
    check_plot(plot, force=force)
    backbone = _backbone(model, shape, adapters)
    report = _measure(backbone, options | {"quantisations": quantisations})
    if plot is not None:
        from parscale_core.analysis.bench_plot import draw
        from parscale_core.analysis.figures import save

        save(draw(report), plot)
    click.echo(json.dumps(report)) if as_json else _print(report)


def _backbone(model: str | None, shape: Path | None, adapters: Sequence[Path]) -> "Backbone":
    if model is not None and shape is not None:
        raise click.UsageError("--model and --shape cannot go together")
    if adapters and model is None:
        raise click.UsageError("--adapter needs --model")
    from parscale_mlx.benchmark.models import Backbone

    return Backbone(model, shape, adapters)


def _measure(backbone: "Backbone", options: dict) -> dict:
    from parscale_mlx.benchmark.report import Plan, measure_all, measure_machine

    machine = measure_machine(cpu_time=options["cpu_time"])
    return {
        "machine": machine,
        "model": backbone.name("SmolLM2-135M's shape, random weights"),
        **{name: options[name] for name in ("tokens", "repeats", "cpu_time")},
        "rows": measure_all(machine, backbone, Plan(**options)),
    }


def _measure_shares(backbone: "Backbone", modes: Sequence[str], options: dict) -> dict:
    from parscale_mlx.benchmark.shares import measure_all

    asked = {name: options[name] for name in ("streams", "prompt", "tokens", "repeats")}
    return measure_all(backbone, modes, **asked)


def _print(report: dict) -> None:
    machine = report["machine"]
    click.echo(
        f"{report['model']} on {machine['name']}\n{report['tokens']} tokens decoded, medians of "
        f"{report['repeats']} turns" + (" in processor time" if report["cpu_time"] else "")
    )
    rates = ", ".join(f"{v / 1e9:.4g} GFLOP/s in {k}" for k, v in machine["flops"].items())
    click.echo(f"measured first: {machine['bandwidth'] / 1e9:.4g} GB/s, {rates}")
    click.echo(
        f"\n{'':27}{'first token':^16}{'':7}{'of':>7}{'a step':^15}{'':7}{'MB':>8}{'of':>6}"
        f"{'peak':>7}\n"
        f"{'weights':7}{'batch':>6}{'prompt':>7}{'side':>7}"
        f"{'ms':>9}{'times':>7}{'tok/s':>7}{'FLOP/s':>7}"
        f"{'ms':>8}{'times':>7}{'tok/s':>7}{'moved':>8}{'GB/s':>6}{'MB':>7}"
    )
    for row in report["rows"]:
        click.echo(
            f"{row['weights']:7}{row['batch']:>6}{row['prompt']:>7}{row['side']:>7}"
            f"{row['first_token'] * 1e3:>9.1f}{row['first_token_times']:>6.2f}x"
            f"{row['prefill_rate']:>7.1f}{row['compute_share']:>7.0%}"
            f"{row['step'] * 1e3:>8.2f}{row['step_times']:>6.2f}x{row['decode_rate']:>7.1f}"
            f"{row['step_bytes'] / 1e6:>8.1f}{row['bandwidth_share']:>6.0%}"
            f"{row['peak_memory'] / 1e6:>7.0f}"
        )


def _print_shares(report: dict) -> None:
    """Print what ``measure_all`` gives, and how many times as fast as the whole a share is."""
    threads = f", OPENBLAS_NUM_THREADS={report['blas_threads']}" if report["blas_threads"] else ""
    click.echo(
        f"{report['model']} on {report['ranks']} x {report['device']}{threads}\n"
        f"{report['tokens']} tokens decoded, medians of {report['repeats']} turns\n"
    )
    click.echo(
        f"{'P':>3}{'prompt':>7}  {'side':11}{'first token, ms':>18}{'a step, ms':>18}"
        f"{'sent, B':>13}{'formula, B':>11}{'messages':>9}{'peak MB':>8}"
    )
    for row in report["rows"]:
        sent = "-" if row["sent_bytes"] is None else f"{row['sent_bytes']:,}"
        click.echo(
            f"{row['streams']:>3}{row['prompt']:>7}  {row['side']:11}"
            f"{row['first_token'] * 1e3:>11.1f}{row['first_token_speed_up']:>6.2f}x"
            f"{row['step'] * 1e3:>11.2f}{row['step_speed_up']:>6.2f}x"
            f"{sent:>13}{row['formula_bytes']:>11,}{row['messages']:>9}"
            f"{row['peak_memory'] / 1e6:>8.0f}"
        )
