"""``parscale scaling-law``: fit the parallel scaling law, and ask it what streams are worth."""

import importlib.util
import json

import click
from parscale_core.analysis.numbers import count

from parscale_cli.options.command import argument, command, heading, option, refuse
from parscale_cli.options.common import FILE, check_plot, force_option, json_option, plot_option
from parscale_cli.options.types import ParameterCount, Real, Whole, WholeNumbers

NAMES = ("E", "A", "alpha", "k")


@command("scaling-law")
@argument("table", required=False, type=FILE)
@heading("Prediction")
@option(
    "--parameters",
    type=ParameterCount(),
    help="Say what streams do for a model of N parameters outside the embedding, such as 1.6B.",
)
@option(
    "--streams",
    type=WholeNumbers("P,P"),
    default="1,2,4,8",
    help="The numbers of streams to say it for.",
)
@heading("Intervals")
@option(
    "--bootstrap",
    type=Whole(10, 100_000),
    default=200,
    metavar="N",
    help="Resamples for the intervals.",
)
@option(
    "--confidence", type=Real(50, 99.9), default=95, metavar="PERCENT", help="Of the intervals."
)
@option("--seed", type=Whole(0), default=0, help="Of the resamples.")
@plot_option("lines of equal loss over parameters and streams")
@force_option("Replace an existing plot.")
@json_option
@click.pass_context
def scaling_law(ctx, table, parameters, streams, bootstrap, confidence, seed, plot, force, as_json):
    """Fit L = E + (A / (N (k ln P + 1)))^alpha to a table of losses, CSV.

    The columns are parameters, streams and loss; a column dataset, if there is one, names several
    tables in one file. Without a TABLE, the 48 losses of the ParScale paper are fitted: 24 on
    Stack-V2-Python and 24 on the Pile.
    """
    if parameters is None:
        refuse(ctx, "needs --parameters", "streams")
    for package in ("scipy", "threadpoolctl"):
        if importlib.util.find_spec(package) is None:
            raise ImportError(f"scaling-law needs {package}: pip install 'parscale[analysis]'")
    check_plot(plot, force=force)
    from parscale_core.analysis import fit
    from parscale_core.analysis.loss_table import PAPER_LOSSES, read_losses

    fits, reports = [], []
    for losses in read_losses(table or PAPER_LOSSES):
        law = fit.fit(losses)
        laws = fit.bootstrap(losses, law, bootstrap, seed)
        fits.append((losses, law))
        report = {
            "dataset": losses.dataset,
            "losses": len(losses.loss),
            "r_squared": fit.r_squared(losses, law),
            "confidence": confidence,
            "parameters": {
                name: _with_interval(
                    getattr(law, name), [getattr(x, name) for x in laws], confidence
                )
                for name in NAMES
            },
        }
        if parameters is not None:
            report["predictions"] = [
                _predict(law, laws, parameters, p, confidence)
                | {"extrapolated": not losses.covers(parameters, p)}
                for p in streams
            ]
        reports.append(report)
    if plot is not None:
        from parscale_core.analysis.contour import draw
        from parscale_core.analysis.figures import save

        save(draw(fits), plot)
    if as_json:
        click.echo(json.dumps({"fits": reports}))
        return
    for report in reports:
        _print(report)


def _predict(law, laws: list, parameters: int, streams: int, confidence: float) -> dict:
    return {
        "parameters": parameters,
        "streams": streams,
        "loss": _with_interval(
            law.loss(parameters, streams), [x.loss(parameters, streams) for x in laws], confidence
        ),
        "equivalent_parameters": _with_interval(
            law.equivalent_parameters(parameters, streams),
            [x.equivalent_parameters(parameters, streams) for x in laws],
            confidence,
        ),
    }


def _with_interval(value: float, draws: list[float], confidence: float) -> dict[str, float]:
    import numpy as np

    rest = (100 - confidence) / 2
    low, high = np.percentile(draws, [rest, 100 - rest])
    return {"value": float(value), "low": float(low), "high": float(high)}


def _print(report: dict) -> None:
    click.echo(
        f"{report['dataset']}: {report['losses']} losses, R² {report['r_squared']:.4f}; "
        f"in brackets, where {report['confidence']:g} % of the resamples fall"
    )
    for name in NAMES:
        click.echo(f"  {name:6}" + _bracketed(report["parameters"][name], "{:.4g}".format))
    for prediction in report.get("predictions", []):
        size = count(prediction["parameters"])
        click.echo(
            f"  {size} with P={prediction['streams']}: "
            f"loss {_bracketed(prediction['loss'], '{:.4f}'.format)}, as "
            f"{_bracketed(prediction['equivalent_parameters'], count)} parameters without streams"
            + (" (beyond the table)" if prediction["extrapolated"] else "")
        )


def _bracketed(estimate: dict[str, float], shown) -> str:
    return f"{shown(estimate['value'])} [{shown(estimate['low'])}, {shown(estimate['high'])}]"
