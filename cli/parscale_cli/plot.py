"""``parscale plot``: loss curves of training runs."""

import click

from parscale_cli.options.command import argument, command
from parscale_cli.options.model import FOLDER
from parscale_cli.options.output import force_option, output_option


@command()
@argument("runs", nargs=-1, required=True, metavar="RUN...", type=FOLDER)
@output_option("The picture to write: .png or .svg.", folder=False, required=True)
@force_option("Replace the output.")
def plot(runs, output, force):
    """Draw the losses of training runs, their folders, into one picture."""
    if output.suffix not in (".png", ".svg"):
        raise click.UsageError(f"--output {output}: not a .png or .svg file")
    from parscale_mlx.training.plot import plot as run

    run(list(runs), output, force=force)
    click.echo(f"Wrote {output}")
