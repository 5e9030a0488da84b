"""``parscale adapter``: take streams out of a checkpoint, and say what an adapter is."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import click

from parscale_cli.options.command import Command, Group, argument, heading, option
from parscale_cli.options.common import folder_options, json_option
from parscale_cli.options.types import Real


@click.group(cls=Group)
def adapter():
    """Stream adapters: the streams of a model, apart from their backbone."""


@adapter.command(cls=Command)
@argument("source", metavar="SOURCE")
@heading("Model")
@option(
    "--backbone",
    required=True,
    metavar="DIR|NAME",
    help="The same model without streams: a folder or a hub name.",
)
@option(
    "--tolerance",
    type=Real(0, 1),
    default=0.0,
    help="How far a number of the backbone may be from the source's.",
)
@folder_options("an adapter")
@json_option
def extract(source, backbone, output, as_json, **options):
    """Write the streams of a checkpoint as an adapter over its backbone.

    SOURCE is a model with streams: a folder, published or converted, or a name on the hub.
    """
    from parscale_core.checkpoint.extract import extract as run

    found = run(source, backbone, output, progress=True, **options)
    if as_json:
        click.echo(json.dumps(dataclasses.asdict(found)))
        return
    click.echo(f"Wrote {found.output}: {_size(found.streams, found.prefix_length, found.bytes)}")
    if found.different:
        click.echo(
            f"The backbones differ in {found.different} of {found.compared} tensors, "
            f"{found.largest_name} by as much as {found.largest_difference:.3g}"
        )
    else:
        click.echo(f"The backbones agree in every bit of {found.compared} tensors")


@adapter.command(cls=Command)
@argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@json_option
def show(folder, as_json):
    """Say what an adapter is: its streams, its size, its backbone."""
    from parscale_core.checkpoint.adapter import read_adapter
    from parscale_core.checkpoint.weight_files import DTYPES, read_header

    found = read_adapter(folder)
    tensors = read_header(found.weights)
    about: dict[str, Any] = {
        "streams": found.streams,
        "prefix_length": found.prefix_length,
        "smoothing": found.smoothing,
        "tensors": len(tensors),
        "bytes": sum(entry.size for entry in tensors.values()),
        "dtypes": sorted({DTYPES.get(e.dtype, e.dtype) for e in tensors.values()}),
        "backbone": found.backbone,
        "backbone_sha256": found.backbone_sha256,
    }
    if as_json:
        click.echo(json.dumps(about))
        return
    click.echo(f"{folder}: {_size(found.streams, found.prefix_length, about['bytes'])}")
    click.echo(f"{about['tensors']} tensors of {', '.join(about['dtypes'])}")
    click.echo(f"smoothing {found.smoothing:g}")
    click.echo(f"backbone {found.backbone}, fingerprint {found.backbone_sha256}")


def _size(streams: int, prefix_length: int, size: int) -> str:
    return f"{streams} streams with {prefix_length} prefix tokens, {size / 1e6:,.1f} MB"
