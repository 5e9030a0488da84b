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
from losses import compare, count, differences, file_losses, held_out


def measure(work: Path, runs: list[Run]) -> None:
    """Write ``results.json`` and ``results.md``; each model's losses are computed once."""
    backbone_folder = smollm2_folder()
    backbone, _ = parscale_mlx.load_model(backbone_folder)
    files = held_out(work, PLAN, backbone_folder)
    counts = np.array([count([file]) for file in files])
    losses = {"backbone": {0: cached(work / "losses.npy", lambda: file_losses(backbone, files))}}
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
    controls = [name for name in arrays if not name.startswith("P=")]
    against = compare(arrays, counts, controls)
    (work / "results.json").write_text(json.dumps(against, indent=4) + "\n")
    text = differences(against, counts)
    (work / "results.md").write_text(text)
    print(text)


def cached(file: Path, compute) -> np.ndarray:
    if not file.is_file():
        np.save(file, compute())
    return np.load(file)
