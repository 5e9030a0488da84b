"""``parscale plot``: loss curves of training runs."""

import click
from parscale_core.analysis.figures import FORMATS

from parscale_cli.options.command import argument, command
from parscale_cli.options.common import FOLDER, check_plot, force_option, output_option


@command()
@argument("runs", nargs=-1, required=True, metavar="RUN...", type=FOLDER)
@output_option(f"The picture to write: {' or '.join(FORMATS)}.", folder=False, required=True)
@force_option("Replace the output.")
def plot(runs, output, force):
    """Draw the losses of training runs, their folders, into one picture."""
    check_plot(output, force=force, option="--output")
    from parscale_mlx.training.loss_plot import plot as run

    run(list(runs), output, force=force)
    click.echo(f"Wrote {output}")
