"""``parscale fuse``: a backbone and a stream adapter to one checkpoint."""

import click

from parscale_cli.options.command import command, heading, option
from parscale_cli.options.common import FOLDER, folder_options, layout_option, model_option


@command()
@model_option("The backbone: a folder or a hub name.", required=True)
@heading("Model")
@option("--adapter", required=True, type=FOLDER, metavar="DIR", help="The stream adapter.")
@folder_options("a model folder")
@layout_option
def fuse(model, adapter, output, **options):
    """Write a backbone and a stream adapter as one model folder."""
    from parscale_mlx.fuse import fuse as run

    run(model, adapter, output, progress=True, **options)
    click.echo(f"Wrote {output}")
