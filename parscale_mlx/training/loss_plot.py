"""Loss curves of runs in one picture."""

from pathlib import Path
from typing import Any

from parscale_mlx.training.metrics_file import read_metrics

from parscale_core.analysis.figures import check_figure, save


def plot(runs: list[Path], output: Path, *, force: bool = False) -> None:
    """Draw the training and held-out losses of runs over the tokens they learnt from.

    Args:
        output: the file to write, in the format that its ending names.
        force: replace ``output``.

    Raises:
        FileNotFoundError, ValueError: a run has no metrics.
        OSError, ValueError, ImportError: as ``check_figure``.
    """
    check_figure(output, force=force)
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for run in runs:
        _draw(axes, run)
    axes.set_xlabel("training steps")
    axes.set_ylabel("loss (nats a token)")
    axes.grid(alpha=0.3)
    axes.legend()
    save(figure, output, dpi=150)


def _draw(axes: Any, run: Path) -> None:
    records = read_metrics(run)
    trained = [(r["iteration"], r["train_loss"]) for r in records if "train_loss" in r]
    held_out = [(r["iteration"], r["val_loss"]) for r in records if "val_loss" in r]
    if not trained and not held_out:
        raise ValueError(f"{run}: no losses in its metrics yet")
    # Runs of one name in several folders are told apart by more of their paths.
    (line,) = axes.plot(*zip(*trained, strict=True), alpha=0.4) if trained else axes.plot([], [])
    if held_out:
        axes.plot(*zip(*held_out, strict=True), marker="o", markersize=3, color=line.get_color(),
                  label=f"{run}, held out")  # fmt: skip
    else:
        line.set_label(str(run))
