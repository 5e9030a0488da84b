"""The recipe's training runs, each a call of ``parscale train``; none is done twice."""

import json
import os
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from plan import Plan

PARSCALE = (sys.executable, "-c", "from parscale_cli.main import cli; cli()")


@dataclass
class Run:
    """One run of stage 2: its folder, what is trained with which seed, and whether all of it.

    Attributes:
        prefix_length: 0 without streams.
    """

    folder: Path
    streams: int
    prefix_length: int
    seed: int
    train_all: bool

    @property
    def name(self) -> str:
        if self.train_all:
            return f"whole model, P={self.streams}"
        if self.streams == 1:
            return f"one stream, prefix of {self.prefix_length}"
        return f"streams only, P={self.streams}"

    @property
    def result(self) -> Path:
        return self.folder / ("model" if self.train_all else "adapter")


def stage_two(work: Path, plan: Plan) -> list[Run]:
    """The runs of stage 2: adapters and their controls, and whole models, one without streams.

    The controls are one stream with a prefix: as long as a stream's, and as long as all of them.
    """
    runs = []
    length = plan.prefix_length
    for seed in plan.seeds:
        for streams in sorted((1, *plan.streams), reverse=True):
            folder = work / "runs" / f"all-p{streams}-seed{seed}"
            runs.append(Run(folder, streams, length if streams > 1 else 0, seed, True))
            if streams > 1:
                folder = work / "runs" / f"frozen-p{streams}-seed{seed}"
                runs.append(Run(folder, streams, length, seed, False))
        for prefix in (length, length * max(plan.streams)):
            folder = work / "runs" / f"frozen-prefix{prefix}-seed{seed}"
            runs.append(Run(folder, 1, prefix, seed, False))
    return runs


def pretrain(work: Path, plan: Plan) -> None:
    """Stage 1, in as many processes as there are jobs."""
    run = work / "runs" / "backbone"
    options = [
        *("--stage", "pretrain", "--config", work / "config", "--lr", plan.pretrain_lr),
        *("--steps", max(1, plan.pretrain_tokens // (plan.batch_size * plan.seq_length))),
        *("--batch-size", plan.batch_size),
    ]
    ranks = plan.jobs if plan.batch_size % plan.jobs == 0 else 1
    train_once(work, plan, run, run / "model", options, ranks=ranks)


def train_streams(work: Path, plan: Plan) -> None:
    """Stage 2, several runs side by side: first the adapters, then whole models; longest first."""
    with ThreadPoolExecutor(plan.jobs) as pool:
        order = sorted(stage_two(work, plan), key=lambda run: (run.train_all, -run.streams))
        for _ in pool.map(lambda run: _train_streams(work, plan, run), order):
            pass


def _train_streams(work: Path, plan: Plan, run: Run) -> None:
    options = [
        *("--model", work / "runs" / "backbone" / "model", "--seed", run.seed),
        *("--steps", max(1, plan.stream_tokens // (plan.stream_batch_size * plan.seq_length))),
        *("--batch-size", plan.stream_batch_size),
    ]
    if run.prefix_length:
        options += ["--stage", "streams", "--streams", run.streams, "--init", plan.init]
        options += ["--prefix-length", run.prefix_length, "--streams-lr", plan.streams_lr]
        options += ["--aggregator-lr", plan.aggregator_lr]
        options += ["--train-all"] if run.train_all else ["--freeze-backbone"]
    else:
        options += ["--stage", "pretrain"]
    options += ["--lr", plan.train_all_lr]
    train_once(work, plan, run.folder, run.result, options, log=True)


def train_once(
    work: Path,
    plan: Plan,
    run: Path,
    result: Path,
    options: list,
    *,
    ranks: int = 1,
    log: bool = False,
) -> None:
    """One run, gone on with if it was stopped, left alone if it is finished.

    Args:
        result: the folder it leaves.
        options: of ``parscale train``, besides those that all runs share.
        ranks: processes that share its batches.
        log: write what it says to a file beside its folder, not to standard error.
    """
    if result.is_dir():
        return
    print(f"{run.name}: begin", flush=True)
    if (run / "run.json").is_file():
        options = ["--resume", run]
    else:
        options += [
            *("--data", work / "corpus" / "train", "--valid", work / "corpus" / "tune"),
            *("--seq-length", plan.seq_length, "-o", run),
            *("--eval-sequences", max(1, plan.eval_tokens // plan.seq_length // 4)),
            *("--eval-every", 100, "--save-every", 100, "--report-every", 20, "--keep", 1),
        ]
        run.parent.mkdir(exist_ok=True)
    command = [*PARSCALE, "train", *map(str, options)]
    threads = {"OPENBLAS_NUM_THREADS": "1"} if plan.jobs > 1 else {}
    output = (run.parent / f"{run.name}.log").open("a") if log else None
    processes = [
        subprocess.Popen(command, stderr=output, env=os.environ | threads | variables)
        for variables in ring(run.parent, ranks)
    ]
    for process in processes:
        process.wait()
    if not result.is_dir():
        raise SystemExit(f"{run.name} failed" + (f": see {run}.log" if log else ""))
    print(f"{run.name}: done", flush=True)


def ring(folder: Path, ranks: int) -> list[dict[str, str]]:
    """The environment variables of each rank of an MLX ring on this machine.

    mlx.launch would set the same ones, but it keeps a whole core busy itself.
    """
    if ranks == 1:
        return [{}]
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(ranks)]
    hosts = [[f"127.0.0.1:{s.getsockname()[1]}"] for s in sockets]
    for s in sockets:
        s.close()
    (folder / "hosts.json").write_text(json.dumps(hosts))
    return [
        {"MLX_RANK": str(rank), "MLX_HOSTFILE": str(folder / "hosts.json")} for rank in range(ranks)
    ]
