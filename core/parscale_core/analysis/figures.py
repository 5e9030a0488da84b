"""Write figures whole or not at all."""

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from parscale_core.checkpoint.output import check_file, working_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FORMATS = (".png", ".svg", ".pdf")


def check_figure(file: Path, *, force: bool) -> None:
    """Find out before the work whether a figure can be written.

    Args:
        force: replace the file.

    Raises:
        ValueError: the file's ending names no format.
        OSError: it cannot be written; see ``check_file``.
        ImportError: matplotlib is not installed.
    """
    if file.suffix.lower() not in FORMATS:
        raise ValueError(f"{file}: the name must end in {', '.join(FORMATS)}")
    check_file(file, force=force)
    if find_spec("matplotlib") is None:
        raise ImportError("plots need matplotlib: pip install 'parscale[plot]'")


def save(figure: "Figure", file: Path, *, dpi: int = 100) -> None:
    """Write the figure, in the format that the file's ending names, whole or not at all."""
    with working_file(file) as new:
        figure.savefig(new, dpi=dpi)
