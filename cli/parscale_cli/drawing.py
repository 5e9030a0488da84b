"""The option --plot, and the packages that analyses need."""

from pathlib import Path

import click

FORMATS = (".png", ".svg", ".pdf")


def plot_option(what: str):
    """Add ``--plot FILE``; see ``check_plot`` and ``parscale_core.analysis.figures``."""
    return click.option(
        "--plot",
        metavar="FILE",
        type=click.Path(dir_okay=False, path_type=Path),
        help=f"Draw {what} into this file, {', '.join(FORMATS)} by its ending.",
    )


def check_plot(file: Path | None, *, force: bool) -> None:
    """Find out before the work whether ``file`` can be written.

    Raises:
        click.UsageError: its ending is not a known format.
        FileNotFoundError, FileExistsError: there is no such folder, or there is such a file and
            ``force`` is not given.
        ImportError: matplotlib is not installed.
    """
    if file is None:
        return
    if file.suffix.lower() not in FORMATS:
        raise click.UsageError(f"--plot {file}: the name must end in {', '.join(FORMATS)}")
    if not file.absolute().parent.is_dir():
        raise FileNotFoundError(f"{file}: no folder {file.parent}")
    if file.exists() and not force:
        raise FileExistsError(f"{file} exists already (--force replaces it)")
    require("matplotlib", "--plot")


def require(package: str, what: str) -> None:
    """Say in one line what to install where an optional package is missing.

    Raises:
        ImportError: it is.
    """
    from importlib.util import find_spec

    if find_spec(package) is None:
        raise ImportError(f"{what} needs {package}: pip install 'parscale[analysis]'")
