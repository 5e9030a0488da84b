"""``parscale cost``: what P streams cost, beside the larger model that is as good."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import click

from parscale_cli.cost_tables import print_headline, print_report
from parscale_cli.options.command import argument, command, option, refuse
from parscale_cli.options.output import force_option, json_option
from parscale_cli.options.plot import check_plot, plot_option
from parscale_cli.options.types import OneOf, Real, Whole, WholeNumbers

THIS = "this"
DEVICES = (
    "a100", "a100-40gb", "h100", "h100-pcie", "h200", "m1", "m1-pro", "m1-max", "m1-ultra",
    "m2", "m2-pro", "m2-max", "m2-ultra", "m3", "m3-pro", "m3-max", "m3-ultra", "m4", "m4-pro",
    "m4-max",
)  # fmt: skip
BITS = (2, 3, 4, 5, 6, 8, 16, 32)
SIZES = ("0.5B", "0.7B", "1.1B", "1.6B", "2.8B", "4.4B")


@command()
@argument("model", default="1.6B", metavar=f"[DIR|FILE|{'|'.join(SIZES)}]")
@option(
    "--streams",
    section="Model",
    type=WholeNumbers("P,P", most=64),
    default="2,4,8",
    show_default=True,
    help="Numbers of streams to price.",
)
@option(
    "--weight-bits",
    section="Model",
    type=OneOf(*BITS),
    help="Bits of a weight; by default as the model's config.json has it.",
)
@option(
    "--kv-bits",
    section="Model",
    type=OneOf(*BITS),
    help="Bits of a number in the KV cache; by default those of the activations.",
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
    type=Whole(1),
    default=256,
    show_default=True,
    metavar="TOKENS",
    help="Tokens of each prompt.",
)
@option(
    "--answer",
    section="Lengths",
    type=Whole(2),
    default=256,
    show_default=True,
    metavar="TOKENS",
    help="Tokens of each answer.",
)
@option(
    "--device",
    "devices",
    section="Device",
    multiple=True,
    type=click.Choice((*DEVICES, THIS)),
    default=("a100",),
    metavar="NAME",
    help=f"{', '.join(DEVICES)}, or {THIS}: the machine here, measured. May be given several "
    "times.  [default: a100]",
)
@option(
    "--compute-share",
    section="Device",
    type=Real(0, 100, min_open=True),
    metavar="PERCENT",
    help="Of the device's peak that programs reach.  [default: 70, and 100 of what was measured]",
)
@option(
    "--bandwidth-share",
    section="Device",
    type=Real(0, 100, min_open=True),
    metavar="PERCENT",
    help="Likewise of the memory bandwidth.  [default: 90, and 100 of what was measured]",
)
@option(
    "--law",
    section="Law",
    type=click.Choice(["stack-v2-python", "pile"]),
    default="stack-v2-python",
    show_default=True,
    help="The data whose scaling law says which larger model is as good.",
)
@option("--k", section="Law", type=Real(0), help="What streams are worth, from a fit of your own.")
@option("--parts", section="Output", is_flag=True, help="Show the parts of a decoding step.")
@option(
    "--paper",
    section="Output",
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
        print_headline(as_json=as_json)
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
        print_report(report, parts=parts)


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
    from parscale_core.analysis import devices
    from parscale_core.analysis.roofline import Machine

    if name == THIS:
        device, compute, bandwidth = _measure(precision.others), 100, 100
    else:
        device, compute, bandwidth = devices.DEVICES[name], 70, 90
    return Machine(
        device,
        (options["compute_share"] or compute) / 100,
        (options["bandwidth_share"] or bandwidth) / 100,
    )


def _measure(bits: int):
    from parscale_mlx import machine

    import mlx.core as mx
    from parscale_core.analysis.devices import Device

    if mx.default_device() == mx.cpu and bits < 32:
        click.echo("parscale computes in float32 here; --weight-bits 32 counts that", err=True)
    flops = machine.measure_flops(mx.float32 if bits > 16 else mx.float16)
    return Device(machine.device_name(), machine.measure_bandwidth(), flops, flops)
