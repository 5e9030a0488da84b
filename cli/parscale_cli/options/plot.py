"""The option --plot."""

from pathlib import Path

import click
from parscale_core.analysis.figures import FORMATS, check_figure

from parscale_cli.options.command import option


def plot_option(what: str):
    """Add ``--plot FILE``; see ``check_plot`` and ``parscale_core.analysis.figures``."""
    return option(
        "--plot",
        section="Output",
        metavar="FILE",
        type=click.Path(dir_okay=False, path_type=Path),
        help=f"Draw {what} into this file, {', '.join(FORMATS)} by its ending.",
    )


def check_plot(file: Path | None, *, force: bool, option: str = "--plot") -> None:
    """Find out before the work whether ``file`` can be written.

    Raises:
        click.UsageError: its ending names no format, or ``force`` without a plot.
        OSError, ImportError: as ``check_figure``.
    """
    if file is None:
        if force:
            raise click.UsageError("--force needs --plot: there is nothing else to replace")
        return
    try:
        check_figure(file, force=force)
    except ValueError as error:
        raise click.UsageError(f"{option} {error}") from error
