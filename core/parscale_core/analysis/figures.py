"""Write figures whole or not at all."""

from pathlib import Path

from matplotlib.figure import Figure


def save(figure: Figure, file: Path) -> None:
    """Write the figure, in the format that the file's ending names, whole or not at all."""
    partial = file.with_name(f".{file.name}.partial{file.suffix}")
    try:
        figure.savefig(partial, dpi=100)
        partial.replace(file)
    finally:
        partial.unlink(missing_ok=True)
