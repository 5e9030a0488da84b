"""Draw a fitted scaling law: the loss over parameters and streams."""

import numpy as np
from matplotlib.figure import Figure

from parscale_core.analysis.law import ScalingLaw
from parscale_core.analysis.loss_table import Losses
from parscale_core.analysis.numbers import count


def draw(fits: list[tuple[Losses, ScalingLaw]]) -> Figure:
    """One panel a dataset: lines of equal loss, and the measured points in their own colours."""
    figure = Figure(figsize=(6 * len(fits), 4.5), layout="constrained")
    panels = figure.subplots(1, len(fits), squeeze=False)[0]
    for axes, (losses, law) in zip(panels, fits, strict=True):
        parameters = np.geomspace(losses.parameters.min() / 1.3, losses.parameters.max() * 1.3, 200)
        streams = np.geomspace(1, losses.streams.max() * 1.3, 200)
        surface = law.loss(parameters[None], streams[:, None])
        low = min(surface.min(), losses.loss.min())
        levels = np.linspace(low, max(surface.max(), losses.loss.max()), 15)
        filled = axes.contourf(parameters, streams, surface, levels, cmap="viridis")
        lines = axes.contour(parameters, streams, surface, levels, colors="white", linewidths=0.5)
        axes.clabel(lines, fontsize=7, fmt="%.3f")
        axes.scatter(
            losses.parameters,
            losses.streams,
            c=losses.loss,
            norm=filled.norm,
            cmap="viridis",
            edgecolors="black",
        )
        axes.set(xscale="log", yscale="log", xlabel="parameters N outside the embedding",
                 ylabel="streams P", title=losses.dataset)  # fmt: skip
        ticks = sorted(set(losses.streams))
        axes.set_yticks(ticks, [f"{p:g}" for p in ticks], minor=False)
        axes.minorticks_off()
        sizes = sorted(set(losses.parameters[losses.streams == losses.streams.min()]))
        axes.set_xticks(sizes, [count(n) for n in sizes], rotation=30)
        figure.colorbar(filled, ax=axes, label="loss, nats a token")
    return figure
