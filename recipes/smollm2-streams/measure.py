"""Held-out loss of the backbone, of streams, and of one stream with a prefix, side by side.

Differences are paired by document, and their intervals a bootstrap over documents and seeds.
"""

import json
import sys
from pathlib import Path

import parscale_mlx
from parscale_mlx.adapter import load_adapter, with_streams

import numpy as np
from package import trained
from parscale_core.checkpoint.packaged import smollm2_folder
from plan import PLAN, Run
from training import folder, newest

# The two recipes share how they read held-out text and compare losses.
sys.path.append(str(Path(__file__).parent.parent / "python-small"))
from losses import count, file_losses, held_out, summarise


def measure(work: Path, runs: list[Run]) -> None:
    """Write ``results.json`` and ``results.md``; each model's losses are computed once."""
    backbone_folder = smollm2_folder()
    backbone, _ = parscale_mlx.load_model(backbone_folder)
    files = held_out(work, PLAN, backbone_folder)
    counts = np.array([count([file]) for file in files])
    losses = {"no prefix": {0: cached(work / "losses.npy", lambda: file_losses(backbone, files))}}
    for run in runs:
        if (found := newest(work, run)) is None:
            continue
        adapter = load_adapter(found, backbone=backbone_folder)
        name = f"P={run.streams}" if run.streams > 1 else f"prefix of {run.prefix_length}"
        file = folder(work, run) / f"losses-{trained(work, run)}.npy"
        losses.setdefault(name, {})[run.seed] = cached(
            file, lambda a=adapter: file_losses(with_streams(backbone, a), files)
        )
        print(f"{run.name}: {losses[name][run.seed].sum() / counts.sum():.4f}", flush=True)
    arrays = {name: np.stack(list(seeds.values())) for name, seeds in losses.items()}
    against = {
        control: summarise(arrays | {"backbone": arrays[control]}, counts)
        for control in arrays
        if not control.startswith("P=")
    }
    (work / "results.json").write_text(json.dumps(against, indent=4) + "\n")
    text = table(against, counts)
    (work / "results.md").write_text(text)
    print(text)


def cached(file: Path, compute) -> np.ndarray:
    if not file.is_file():
        np.save(file, compute())
    return np.load(file)


def table(against: dict[str, dict], counts: np.ndarray) -> str:
    """Losses, and differences to the backbone and to each control, as Markdown."""
    lines = [
        f"Held-out loss in nats a token over {counts.sum():,} tokens of {len(counts)} documents; "
        "differences with 95 % intervals by bootstrap over documents and seeds.",
        "",
        f"| model | seeds | loss | {' | '.join(f'against {name}' for name in against)} |",
        "| --- | ---: | ---: |" + " ---: |" * len(against),
    ]
    for name, row in against["no prefix"].items():
        if name == "backbone":
            continue
        cells = []
        for control, rows in against.items():
            r = rows[name]
            low, high = r["difference_interval"]
            same = name == control
            cells.append("" if same else f"{r['difference']:+.4f} [{low:+.4f}, {high:+.4f}]")
        lines.append(f"| {name} | {len(row['seeds'])} | {row['loss']:.4f} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"
