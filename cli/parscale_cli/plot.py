"""``parscale plot``: loss curves of training runs."""

from pathlib import Path

import click


@click.command()
@click.argument(
    "runs",
    nargs=-1,
    required=True,
    metavar="RUN...",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
)
@click.option(
    "-o",
    "--output",
    required=True,
    metavar="FILE",
    type=click.Path(dir_okay=False, path_type=Path),
    help="The picture to write: .png or .svg.",
)
@click.option("--force", is_flag=True, help="Replace the output.")
def plot(runs, output, force):
    """Draw the losses of training runs, their folders, into one picture."""
    if output.suffix not in (".png", ".svg"):
        raise click.UsageError(f"--output {output}: not a .png or .svg file")
    from parscale_mlx.training.plot import plot as run

    run(list(runs), output, force=force)
    click.echo(f"Wrote {output}")
