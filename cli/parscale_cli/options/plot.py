"""The option --plot, and the packages that analyses need."""

from pathlib import Path

import click
from parscale_core.checkpoint.output import check_file

from parscale_cli.options.command import option

FORMATS = (".png", ".svg", ".pdf")


def plot_option(what: str):
    """Add ``--plot FILE``; see ``check_plot`` and ``parscale_core.analysis.figures``."""
    return option(
        "--plot",
        section="Output",
        metavar="FILE",
        type=click.Path(dir_okay=False, path_type=Path),
        help=f"Draw {what} into this file, {', '.join(FORMATS)} by its ending.",
    )


def check_plot(file: Path | None, *, force: bool) -> None:
    """Find out before the work whether ``file`` can be written.

    Raises:
        click.UsageError: its ending is not a known format, or ``force`` without a plot.
        OSError: it cannot be written; see ``check_file``.
        ImportError: matplotlib is not installed.
    """
    if file is None:
        if force:
            raise click.UsageError("--force needs --plot: there is nothing else to replace")
        return
    if file.suffix.lower() not in FORMATS:
        raise click.UsageError(f"--plot {file}: the name must end in {', '.join(FORMATS)}")
    check_file(file, force=force)
    require("matplotlib", "--plot")


def require(package: str, what: str) -> None:
    """Say in one line what to install where an optional package is missing.

    Raises:
        ImportError: it is.
    """
    from importlib.util import find_spec

    if find_spec(package) is None:
        raise ImportError(f"{what} needs {package}: pip install 'parscale[analysis]'")
