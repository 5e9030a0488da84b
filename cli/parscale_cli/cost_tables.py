"""The tables of ``parscale cost``."""

import json
from dataclasses import asdict

import click
from parscale_core.analysis.numbers import count


def print_report(report: dict, *, parts: bool) -> None:
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


def print_headline(*, as_json: bool) -> None:
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
