"""``parscale cost``: what P streams cost, beside the larger model that is as good."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import click
from parscale_core.analysis.devices import DEVICES, Device
from parscale_core.analysis.numbers import count

from parscale_cli.options.command import argument, command, heading, option, refuse
from parscale_cli.options.common import check_plot, force_option, json_option, plot_option
from parscale_cli.options.types import OneOf, Real, Whole, WholeNumbers

THIS = "this"
BITS = (2, 3, 4, 5, 6, 8, 16, 32)
SIZES = ("0.5B", "0.7B", "1.1B", "1.6B", "2.8B", "4.4B")


@command()
@argument("model", default="1.6B", metavar=f"[DIR|FILE|{'|'.join(SIZES)}]")
@heading("Model")
@option(
    "--streams",
    type=WholeNumbers("P,P", most=64),
    default="2,4,8",
    help="Numbers of streams to price.",
)
@option(
    "--weight-bits",
    type=OneOf(*BITS),
    help="Bits of a weight; by default as the model's config.json has it.",
)
@option(
    "--kv-bits",
    type=OneOf(*BITS),
    help="Bits of a number in the KV cache; by default those of the activations.",
)
@heading("Lengths")
@option("--batch", type=WholeNumbers("N,N"), default="1", help="Sequences at once.")
@option("--prompt", type=Whole(1), default=256, metavar="TOKENS", help="Tokens of each prompt.")
@option("--answer", type=Whole(2), default=256, metavar="TOKENS", help="Tokens of each answer.")
@heading("Device")
@option(
    "--device",
    "devices",
    multiple=True,
    type=click.Choice((*DEVICES, THIS)),
    default=("a100",),
    metavar="NAME",
    help=f"{', '.join(DEVICES)}, or {THIS}: the machine here, measured. May be given several "
    "times.  [default: a100]",
)
@option(
    "--compute-share",
    type=Real(0, 100, min_open=True),
    metavar="PERCENT",
    help="Of the device's peak that programs reach.  [default: 70, and 100 of what was measured]",
)
@option(
    "--bandwidth-share",
    type=Real(0, 100, min_open=True),
    metavar="PERCENT",
    help="Likewise of the memory bandwidth.  [default: 90, and 100 of what was measured]",
)
@heading("Law")
@option(
    "--law",
    type=click.Choice(["stack-v2-python", "pile"]),
    default="stack-v2-python",
    help="The data whose scaling law says which larger model is as good.",
)
@option("--k", type=Real(0), help="What streams are worth, from a fit of your own.")
@heading("Output")
@option("--parts", is_flag=True, help="Show the parts of a decoding step.")
@option(
    "--paper",
    is_flag=True,
    help="Derive the ParScale paper's headline instead, and say what it assumes.",
)
@plot_option("loss over memory and over time")
@force_option("Replace an existing plot.")
@json_option
@click.pass_context
def cost(ctx, model, devices, law, k, parts, paper, plot, force, as_json, **options):
    """Count memory and time of P streams, and of the larger plain model with the same loss.

    The model is a folder, a config.json, or one of the paper's sizes. Bytes and operations are
    counted from its dimensions and timed by a roofline: each part of a step takes as long as its
    arithmetic or its memory traffic. The larger model is as deep and wider, as in the paper.
    """
    if paper:
        others = {p.name for p in ctx.command.params if p.name} - {"paper", "as_json"}
        refuse(ctx, "cannot go with --paper, which has its own", *sorted(others))
        _print_headline(as_json=as_json)
        return
    check_plot(plot, force=force)
    if as_json:
        refuse(ctx, "cannot go with --json, which has them", "parts")
    from parscale_core.analysis.law import PAPER
    from parscale_core.analysis.pricing import price

    the_law = PAPER[law] if k is None else replace(PAPER[law], k=k)
    shape, precision = _model(model, options)
    report = {
        "model": model,
        "shape": asdict(shape),
        "precision": asdict(precision),
        "parameters": shape.parameters(),
        "parameters_outside_embedding": shape.parameters_outside_embedding(),
        "law": {"dataset": law, **asdict(the_law)},
        "prompt": options["prompt"],
        "answer": options["answer"],
        "devices": [],
    }
    for name in devices:
        machine = _machine(name, precision, options)
        rows = [
            price(shape, precision, machine, the_law, streams=p, batch=batch,
                  prompt=options["prompt"], answer=options["answer"])
            for batch in options["batch"] for p in sorted({1, *options["streams"]})
        ]  # fmt: skip
        report["devices"].append(asdict(machine) | {"rows": rows})
    if plot is not None:
        from parscale_core.analysis.cost_plot import draw
        from parscale_core.analysis.figures import save

        save(draw(report), plot)
    if as_json:
        click.echo(json.dumps(report))
    else:
        _print_report(report, parts=parts)


def _model(model: str, options: dict):
    from parscale_core.analysis.shape import PAPER_SHAPES, Precision, read_shape

    if model in PAPER_SHAPES:
        shape, precision = PAPER_SHAPES[model], Precision()
    else:
        path = Path(model).expanduser()
        if not path.exists():
            raise click.UsageError(
                f"{model}: neither a model folder, nor a config.json, nor one of {', '.join(SIZES)}"
            )
        shape, precision = read_shape(path)
    bits = options["weight_bits"]
    if bits is not None:
        others = 32 if bits == 32 else precision.others if bits < 16 else 16
        precision = replace(precision, weights=bits, others=others, cache=others)
    if options["kv_bits"] is not None:
        precision = replace(precision, cache=options["kv_bits"])
    return shape, precision


def _machine(name: str, precision, options: dict):
    from parscale_core.analysis.roofline import Machine

    if name == THIS:
        device, compute, bandwidth = _measure(precision.others), 100, 100
    else:
        device, compute, bandwidth = DEVICES[name], 70, 90
    return Machine(
        device,
        (options["compute_share"] or compute) / 100,
        (options["bandwidth_share"] or bandwidth) / 100,
    )


def _measure(bits: int):
    from parscale_mlx import machine

    import mlx.core as mx

    if mx.default_device() == mx.cpu and bits < 32:
        click.echo("parscale computes in float32 here; --weight-bits 32 counts that", err=True)
    flops = machine.measure_flops(mx.float32 if bits > 16 else mx.float16)
    return Device(machine.device_name(), machine.measure_bandwidth(), flops, flops)


def _print_report(report: dict, *, parts: bool) -> None:
    """What the streams and the larger models cost, device by device."""
    precision = report["precision"]
    click.echo(
        f"{report['model']}: {count(report['parameters'])} parameters, "
        f"{count(report['parameters_outside_embedding'])} outside the embedding; "
        f"weights of {precision['weights']} bits, KV cache of {precision['cache']}"
    )
    click.echo(
        f"{report['prompt']} tokens in, {report['answer']} out; as good by k = "
        f"{report['law']['k']:.3f} ({report['law']['dataset']})"
    )
    for machine in report["devices"]:
        device = machine["device"]
        flops = device["flops32" if precision["others"] > 16 else "flops16"]
        click.echo(
            f"\n{device['name']}: {machine['compute_share']:.0%} of {flops / 1e12:.4g} TFLOP/s, "
            f"{machine['bandwidth_share']:.0%} of {device['bandwidth'] / 1e9:.4g} GB/s"
        )
        _print_rows(machine["rows"])
        if parts:
            _print_parts(machine["rows"])


def _print_rows(rows: list[dict]) -> None:
    click.echo(f"{'':9}{'P streams':^36}{'plain model, equal loss':^34}{'adds less':^17}")
    figures = f"{'GB':>9}{'first ms':>9}{'ms/token':>9}{'answer s':>9}"
    click.echo(f"{'batch':>5}{'P':>4}{figures}{'N':>7}{figures[:9]}{figures[18:]}{'memory':>9}"
               f"{'time':>8}")  # fmt: skip
    for row in rows:
        line = f"{row['batch']:>5}{row['streams']:>4}" + _figures(row["cost"])
        if row["streams"] > 1:
            equal, less = row["equal_model"], row["increase_ratio"]
            figures = _figures(equal["cost"])
            line += f"{count(equal['parameters']):>7}{figures[:9]}{figures[18:]}"
            line += f"{less['memory']:>8.1f}x{less['time']:>7.1f}x"
        click.echo(line)
    click.echo("adds less: how many times less P streams add to P=1's than the larger model does")


def _figures(cost: dict) -> str:
    numbers = (cost["memory"] / 1e9, cost["prefill"] * 1e3, cost["per_token"] * 1e3, cost["answer"])
    return "".join(f"{n:>9.3f}" if n < 1e4 else f"{n:>9.4g}" for n in numbers)


def _print_parts(rows: list[dict]) -> None:
    click.echo(
        f"\n{'batch':>5}{'P':>4}  {'one decoding step':18}"
        f"{'GFLOP':>10}{'MB':>11}{'ms':>11}  bound by"
    )
    for row in rows:
        for name, part in row["decode"].items():
            click.echo(
                f"{row['batch']:>5}{row['streams']:>4}  {name:18}{part['flops'] / 1e9:>10.3f}"
                f"{part['bytes'] / 1e6:>11.3f}{part['seconds'] * 1e3:>11.3f}  {part['bound']}"
            )


def _print_headline(*, as_json: bool) -> None:
    """The paper's headline, what it assumes, and what this package's counts make of it."""
    from parscale_core.analysis import headline

    sides = {
        "paper": headline.published(),
        "paper_by_law": headline.published(parameters=headline.law_parameters()),
        "counted": headline.counted(),
    }
    if as_json:
        click.echo(json.dumps({
            "published": headline.PUBLISHED,
            "assumptions": headline.ASSUMPTIONS,
            **{k: asdict(v) | {"increase_ratio": v.increase_ratio()} for k, v in sides.items()},
        }))  # fmt: skip
        return
    click.echo(
        f"P={headline.STREAMS} on {headline.BASE} beside a plain model as good, batch 1\n"
        f"published: adds {headline.PUBLISHED['memory']} times less memory and "
        f"{headline.PUBLISHED['time']} times less time"
    )
    names = ("the paper's accounting", "  ... equal by the fitted law", "parscale's own counts")
    click.echo(f"\n{'':38}{'added memory, MB':>18}{'':8}{'added time, ms':>18}")
    click.echo(f"{'':30}{'as good':>8}{'streams':>9}{'larger':>9}{'':8}{'streams':>9}{'larger':>9}")
    for name, side in zip(names, sides.values(), strict=True):
        less = side.increase_ratio()
        ours, larger = side.streams, side.larger
        click.echo(
            f"{name:30}{count(side.parameters):>8}"
            f"{ours.memory / 1e6:>9.0f}{larger.memory / 1e6:>9.0f}{less['memory']:>7.1f}x"
            f"{ours.time * 1e3:>9.1f}{larger.time * 1e3:>9.1f}{less['time']:>7.1f}x"
        )
    click.echo("\nThe paper's accounting, as it gives the published figures:")
    for assumption in headline.ASSUMPTIONS:
        click.echo(click.wrap_text(f"- {assumption}", 100, subsequent_indent="  "))
    click.echo()
    click.echo(click.wrap_text(
        "parscale's own counts: the same device, precision, lengths and larger model, but the "
        "prefix is read from the cache and never computed again, the cache is read as far as it is "
        "filled, the aggregator works on every token, the activations of all streams count, and "
        "only the last token of the prompt has logits.", 100,
    ))  # fmt: skip
