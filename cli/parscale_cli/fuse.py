"""``parscale fuse``: a backbone and a stream adapter to one checkpoint."""

from pathlib import Path

import click


@click.command()
@click.option(
    "--model", required=True, metavar="DIR|NAME", help="The backbone: a folder or a hub name."
)
@click.option(
    "--adapter",
    required=True,
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    metavar="DIR",
    help="The stream adapter.",
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
    "--to",
    type=click.Choice(["mlx", "hf"]),
    default="mlx",
    show_default=True,
    help="MLX's layout, or what the published PyTorch classes load.",
)
@click.option("--revision", help="Branch, tag or commit of a hub repository.")
@click.option("--force", is_flag=True, help="Replace the output if it is a model folder.")
def fuse(model, adapter, output, to, revision, force):
    """Write a backbone and a stream adapter as one model folder."""
    from parscale_mlx.fuse import fuse as run

    run(model, adapter, output, to=to, revision=revision, force=force, progress=True)
    click.echo(f"Wrote {output}")
