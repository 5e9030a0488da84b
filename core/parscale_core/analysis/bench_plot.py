"""Draw what ``parscale bench`` measured."""

from typing import Any

from matplotlib.figure import Figure

PANELS = (("first_token", "time to the first token, ms"), ("step", "time of a decoding step, ms"))


def draw(report: dict[str, Any]) -> Figure:
    """Both times over P, a line for each case; mlx-lm's own class is a cross at P=1.

    Args:
        report: as ``parscale bench --json`` prints it.
    """
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    cases: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in report["rows"]:
        cases.setdefault((row["weights"], row["batch"], row["prompt"]), []).append(row)
    for axes, (key, label) in zip(figure.subplots(1, 2), PANELS, strict=True):
        for n, ((weights, batch, prompt), rows) in enumerate(cases.items()):
            ours = [row for row in rows if row["side"] != "mlx-lm"]
            plain = next(row for row in rows if row["side"] == "mlx-lm")
            axes.plot(
                [row["streams"] for row in ours],
                [row[key] * 1e3 for row in ours],
                "o-",
                color=f"C{n}",
                label=f"{weights}, batch {batch}, prompt {prompt}",
            )
            axes.plot(1, plain[key] * 1e3, "x", markersize=10, color=f"C{n}")
        ticks = sorted({row["streams"] for row in report["rows"]})
        axes.set(xlabel="streams P (x: mlx-lm's own class)", ylabel=label, xscale="log", ylim=0)
        axes.set_xticks(ticks, [str(p) for p in ticks])
        axes.minorticks_off()
        axes.legend()
    figure.suptitle(f"{report['model']}, {report['machine']['name']}")
    return figure
