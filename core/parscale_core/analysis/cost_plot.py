"""Draw what a loss costs: by streams, and by parameters."""

from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

PANELS = (("memory", "memory, GB", 1e9), ("answer", "time of an answer, s", 1))


def draw(report: dict[str, Any]) -> Figure:
    """Loss over memory and over time, a row of panels for each device.

    Args:
        report: as ``parscale cost --json`` prints it.
    """
    machines = report["devices"]
    figure = Figure(figsize=(11, 4.5 * len(machines)), layout="constrained")
    panels = figure.subplots(len(machines), len(PANELS), squeeze=False)
    for machine, line in zip(machines, panels, strict=True):
        for axes, (key, label, unit) in zip(line, PANELS, strict=True):
            _panel(axes, machine["rows"], key, unit)
            axes.set(xlabel=label, ylabel="loss, nats a token", title=machine["device"]["name"])
            axes.legend()
    return figure


def _panel(axes: Axes, rows: list[dict[str, Any]], key: str, unit: float) -> None:
    for n, batch in enumerate(sorted({row["batch"] for row in rows})):
        mine = [row for row in rows if row["batch"] == batch]
        costs = [row["cost"][key] / unit for row in mine]
        losses = [row["loss"] for row in mine]
        axes.plot(costs, losses, "o-", color=f"C{n}", label=f"batch {batch}: streams")
        for row, x, y in zip(mine, costs, losses, strict=True):
            axes.annotate(f"P={row['streams']}", (x, y), (4, 4), textcoords="offset points")
        larger = [row["equal_model"]["cost"][key] / unit for row in mine if row["streams"] > 1]
        axes.plot([costs[0], *larger], losses, "s--", color=f"C{n}", alpha=0.5,
                  label=f"batch {batch}: parameters")  # fmt: skip
