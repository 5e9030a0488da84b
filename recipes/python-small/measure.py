"""Held-out loss of everything that was trained, with confidence intervals, as table and picture.

The interval is a bootstrap over held-out files, since tokens of one file go together, and over
seeds. Differences are paired: the same files for both sides, and P streams beside one stream that
was trained alike: the backbone itself, or the whole model trained on without streams.
"""

import json
from pathlib import Path

import parscale_mlx
from parscale_mlx.adapter import load_adapter, with_streams

import numpy as np
from losses import LEVEL, compare, count, differences, file_losses, held_out, summarise
from plan import Plan
from runs import stage_two


def measure(work: Path, plan: Plan) -> None:
    """Write ``results.json``, ``results.md``, and the pictures."""
    folder = work / "runs" / "backbone" / "model"
    backbone, _ = parscale_mlx.load_model(folder)
    files = held_out(work, plan, folder)
    counts = np.array([count([file]) for file in files])
    losses: dict[str, list] = {"backbone": [file_losses(backbone, files)]}
    for run in stage_two(work, plan):
        if run.train_all:
            model, _ = parscale_mlx.load_model(run.result)
        else:
            model = with_streams(backbone, load_adapter(run.result, backbone=folder))
        losses.setdefault(run.name, []).append(file_losses(model, files))
        print(f"{run.folder.name}: {losses[run.name][-1].sum() / counts.sum():.4f}", flush=True)
    arrays = {name: np.stack(seeds) for name, seeds in losses.items()}
    results = summarise(arrays, counts)
    (work / "results.json").write_text(json.dumps(results, indent=4) + "\n")
    what = (
        f"Stage 1: {plan.pretrain_tokens:,} tokens, stage 2: {plan.stream_tokens:,} tokens each, "
        f"{len(plan.seeds)} seed{'s' * (len(plan.seeds) > 1)}"
    )
    frozen = {name: own for name, own in arrays.items() if not name.startswith("whole")}
    controls = [name for name in frozen if not name.startswith("streams")]
    tables = [table(results, what, counts), differences(compare(frozen, counts, controls), counts)]
    (work / "results.md").write_text("\n".join(tables))
    draw(results, work / "results.png")
    draw(results, work / "results.svg")
    print((work / "results.md").read_text())


def table(results: dict[str, dict], what: str, counts: np.ndarray) -> str:
    """The results as Markdown.

    Args:
        what: how they were trained.
        counts: predictions in each held-out file.
    """
    lines = [
        f"{what}. Held-out loss in nats a token, over {counts.sum():,} tokens of {len(counts)} "
        f"files; {LEVEL} % intervals by bootstrap over files and seeds.",
        "",
        "| model | loss | interval | against P=1 | interval |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, r in sorted(results.items(), key=lambda item: (item[0] != "backbone", item[0])):
        lines.append(
            f"| {name} | {r['loss']:.4f} | {r['loss_interval'][0]:.4f} to "
            f"{r['loss_interval'][1]:.4f} | {r['difference']:+.4f} | "
            f"{r['difference_interval'][0]:+.4f} to {r['difference_interval'][1]:+.4f} |"
        )
    return "\n".join(lines) + "\n"


def draw(results: dict[str, dict], file: Path) -> None:
    """The differences to one stream over P, with their intervals."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for kind in ("streams only", "whole model"):
        rows = {int(k.rpartition("=")[2]): r for k, r in results.items() if k.startswith(kind)}
        rows |= {} if 1 in rows else {1: results["backbone"]}
        streams = sorted(rows)
        values = [rows[p]["difference"] for p in streams]
        errors = [
            [v - rows[p]["difference_interval"][0] for v, p in zip(values, streams, strict=True)],
            [rows[p]["difference_interval"][1] - v for v, p in zip(values, streams, strict=True)],
        ]
        axes.errorbar(streams, values, yerr=errors, marker="o", capsize=3, label=kind)
    axes.axhline(0, color="grey", linewidth=0.8)
    axes.set_xscale("log", base=2)
    axes.set_xticks(sorted({1, *(int(k.rpartition("=")[2]) for k in results if "=" in k)}))
    axes.xaxis.set_major_formatter("{x:.0f}")
    axes.set_xlabel("streams P")
    axes.set_ylabel("held-out loss against one stream (nats a token)")
    axes.legend()
    figure.savefig(file, dpi=150)
