"""Loss curves of runs in one picture."""

from pathlib import Path

from parscale_mlx.training.metrics import read_metrics

from parscale_core.checkpoint.output import check_file

FORMATS = (".png", ".svg")


def plot(runs: list[Path], output: Path, *, force: bool = False) -> None:
    """Draw the training and held-out losses of runs over the tokens they learnt from.

    Args:
        output: the file to write, .png or .svg.
        force: replace ``output``.

    Raises:
        FileExistsError: ``output`` exists.
        FileNotFoundError, ValueError: a run has no metrics, or the format is another.
        ImportError: matplotlib is not installed.
    """
    if output.suffix not in FORMATS:
        raise ValueError(f"{output}: not a {' or '.join(FORMATS)} file")
    check_file(output, force=force)
    try:
        from matplotlib.figure import Figure
        from parscale_core.analysis.figures import save
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install 'parscale[plot]'") from error
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for run in runs:
        _draw(axes, run)
    axes.set_xlabel("training steps")
    axes.set_ylabel("loss (nats a token)")
    axes.grid(alpha=0.3)
    axes.legend()
    save(figure, output, dpi=150)


def _draw(axes, run: Path) -> None:
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
