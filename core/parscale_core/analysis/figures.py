"""Write figures whole or not at all."""

from pathlib import Path

from matplotlib.figure import Figure

from parscale_core.checkpoint.output import working_file


def save(figure: Figure, file: Path, *, dpi: int = 100) -> None:
    """Write the figure, in the format that the file's ending names, whole or not at all."""
    with working_file(file) as new:
        figure.savefig(new, dpi=dpi)
