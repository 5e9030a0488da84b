"""``parscale bench``: how fast streams are here, beside mlx-lm's plain model and the machine."""

import json
from collections.abc import Sequence
from pathlib import Path

import click

from parscale_cli.options.command import command, given, option, refuse
from parscale_cli.options.model import FOLDER
from parscale_cli.options.output import force_option, json_option
from parscale_cli.options.parallel import joined
from parscale_cli.options.plot import check_plot, plot_option
from parscale_cli.options.types import Modes, OneOf, Whole, WholeNumbers

SHARED_P = (8,)
NOT_SHARED = ("batch", "quantisations", "group_size", "cpu_time", "plot", "force")


@command()
@option("--model", section="Model", metavar="DIR|NAME", help="A model folder or a name on the hub.")
@option(
    "--shape",
    section="Model",
    metavar="FILE",
    type=click.Path(exists=True, path_type=Path),
    help="Random weights in the shape of this config.json; without --model and --shape, in that "
    "of SmolLM2-135M; with --parallel, of Qwen2.5-0.5B.",
)
@option(
    "--adapter",
    "adapters",
    section="Model",
    metavar="DIR",
    multiple=True,
    type=FOLDER,
    help="Stream adapters of --model; where none has the wanted P, streams are random.",
)
@option(
    "--streams",
    section="Model",
    type=WholeNumbers("P,P", most=64),
    default="1,2,4,8",
    help="Numbers of streams.  [default: 1,2,4,8; with --parallel, 8]",
)
@option(
    "--quantize",
    "quantisations",
    section="Model",
    multiple=True,
    type=click.Choice(["none", "2", "3", "4", "5", "6", "8"]),
    default=("none",),
    help="Bits of the weights, none for as they are. May be given several times.  [default: none]",
)
@option(
    "--group-size",
    section="Model",
    type=OneOf(32, 64, 128),
    default=64,
    show_default=True,
    help="Weights that share a scale, with --quantize.",
)
@option(
    "--batch",
    section="Lengths",
    type=WholeNumbers("N,N"),
    default="1",
    show_default=True,
    help="Sequences at once.",
)
@option(
    "--prompt",
    section="Lengths",
    type=WholeNumbers("L,L"),
    default="128",
    show_default=True,
    help="Tokens of the prompts.",
)
@option(
    "--tokens",
    section="Lengths",
    type=Whole(1),
    default=32,
    show_default=True,
    help="Tokens to generate after the first.",
)
@option(
    "--repeats",
    section="Measurement",
    type=Whole(1),
    default=5,
    show_default=True,
    help="Measured turns of each side; medians are shown.",
)
@option(
    "--cpu-time",
    section="Measurement",
    is_flag=True,
    help="Measure the processor's time, all cores added up, not the clock's: where other programs "
    "take the cores. The machine's rates are then those of one core.",
)
@option(
    "--parallel",
    "modes",
    section="Measurement",
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
            _check_model(model, shape, adapters)
            _bench_shares(ctx, (model, shape, adapters), modes, as_json=as_json)
        return
    _check_model(model, shape, adapters)
    if quantisations == ("none",):
        refuse(ctx, "needs --quantize", "group_size")
    check_plot(plot, force=force)
    from parscale_cli.bench_mlx import measure_all, measure_machine

    machine = measure_machine(cpu_time=options["cpu_time"])
    report = {
        "machine": machine,
        "model": model or str(shape or "SmolLM2-135M's shape, random weights"),
        "tokens": options["tokens"],
        "repeats": options["repeats"],
        "cpu_time": options["cpu_time"],
        "rows": measure_all(machine, (model, shape, adapters), quantisations, **options),
    }
    if plot is not None:
        from parscale_core.analysis.bench_plot import draw
        from parscale_core.analysis.figures import save

        save(draw(report), plot)
    if as_json:
        click.echo(json.dumps(report))
    else:
        _print(report)


def _check_model(model: str | None, shape: Path | None, adapters: Sequence[Path]) -> None:
    if model is not None and shape is not None:
        raise click.UsageError("--model and --shape cannot go together")
    if adapters and model is None:
        raise click.UsageError("--adapter needs --model")


def _bench_shares(
    ctx: click.Context,
    backbone: tuple[str | None, Path | None, Sequence[Path]],
    modes: Sequence[str],
    *,
    as_json: bool,
) -> None:
    refuse(ctx, "cannot go with --parallel", *NOT_SHARED)
    from parscale_cli import bench_parallel

    report = bench_parallel.measure_all(
        backbone,
        modes,
        streams=ctx.params["streams"] if "streams" in given(ctx) else SHARED_P,
        prompt=ctx.params["prompt"],
        tokens=ctx.params["tokens"],
        repeats=ctx.params["repeats"],
    )
    if as_json:
        click.echo(json.dumps(report))
    else:
        bench_parallel.print_table(report)


def _print(report: dict) -> None:
    machine = report["machine"]
    click.echo(
        f"{report['model']} on {machine['name']}; {report['tokens']} tokens decoded, medians of "
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
