"""``parscale adapter``: take streams out of a checkpoint, and say what an adapter is."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import click


@click.group()
def adapter():
    """Stream adapters: the streams of a model, apart from their backbone."""


@adapter.command()
@click.argument("source", metavar="SOURCE")
@click.option(
    "--backbone",
    required=True,
    metavar="DIR|NAME",
    help="The same model without streams: a folder or a hub name.",
)
@click.option(
    "-o",
    "--output",
    required=True,
    metavar="DIR",
    type=click.Path(path_type=Path),
    help="The folder to write.",
)
@click.option(
    "--tolerance",
    type=click.FloatRange(0, 1),
    default=0.0,
    show_default=True,
    help="How far a number of the backbone may be from the source's.",
)
@click.option("--revision", help="Branch, tag or commit of the source, where it is on the hub.")
@click.option("--force", is_flag=True, help="Replace the output if it is an adapter.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as a JSON object.")
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


@adapter.command()
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object.")
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
