"""A run of the recipe: a call of ``parscale train``, gone on with if it was stopped."""

import os
import subprocess
import sys
from pathlib import Path

from parscale_core.checkpoint.packaged import smollm2_folder
from plan import Plan, Run

PARSCALE = (sys.executable, "-c", "from parscale_cli.main import cli; cli()")


def folder(work: Path, run: Run) -> Path:
    return work / "runs" / run.name


def newest(work: Path, run: Run) -> Path | None:
    """A run's adapter, or that of its last checkpoint; None before the first."""
    if (done := folder(work, run) / "adapter").is_dir():
        return done
    return max(folder(work, run).glob("checkpoints/step-*"), default=None)


def train_once(work: Path, plan: Plan, run: Run, *, threads: int) -> None:
    """Train a run, unless it is finished; what it says goes to a file beside its folder."""
    output = folder(work, run)
    if (output / "adapter").is_dir():
        return
    output.parent.mkdir(exist_ok=True)
    print(f"{run.name}: begin", flush=True)
    if (output / "run.json").is_file():
        options = ["--resume", output]
    else:
        options = [
            *("--stage", "streams", "--model", smollm2_folder(), "-o", output),
            *("--streams", run.streams, "--prefix-length", run.prefix_length, "--seed", run.seed),
            *("--data", work / "corpus" / "train", "--valid", work / "corpus" / "tune"),
            *("--steps", plan.steps, "--batch-size", plan.batch_size),
            *("--seq-length", plan.seq_length, "--streams-lr", plan.streams_lr),
            *("--aggregator-lr", plan.aggregator_lr, "--eval-sequences", 8),
            *("--eval-every", 200, "--save-every", 20, "--report-every", 20, "--keep", 1),
        ]
    with (output.parent / f"{run.name}.log").open("a") as log:
        result = subprocess.run(
            [*PARSCALE, "train", *map(str, options)],
            env=os.environ | {"OPENBLAS_NUM_THREADS": str(threads)},
            stdout=log,
            stderr=log,
        )
    print(f"{run.name}: {'done' if result.returncode == 0 else 'failed'}", flush=True)
