"""``parscale bench --parallel``: the shares of a model beside the whole of it."""

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from parscale_mlx import benchmark
from parscale_mlx.load import identity
from parscale_mlx.parallel import measure
from parscale_mlx.parallel.ranks import check_same, check_same_input, join
from parscale_mlx.parallel.shard import plan

import click
import mlx.core as mx
from parscale_core.checkpoint.folder import find_folder
from parscale_core.progress import hidden
from tqdm import tqdm

from parscale_cli.bench_mlx import load_backbone


def measure_all(
    backbone: tuple[str | None, Path | None, Sequence[Path]],
    modes: Sequence[str],
    *,
    streams: Sequence[int],
    prompt: Sequence[int],
    tokens: int,
    repeats: int,
) -> dict:
    """What ``parscale bench --parallel`` prints, as plain data: times are this rank's.

    Args:
        backbone: as for ``bench_mlx.measure_all``.
        modes: as for ``parscale_mlx.parallel.shard.plan``.

    Raises:
        FileNotFoundError, ValueError: as ``load_model``, and ``load_adapter``; or the ranks were
            asked different things, or cannot share such a model.
    """
    group = join()
    model, shape, adapter_folders = backbone
    if model is not None:
        for adapter in (None, *adapter_folders):
            check_same(group, identity(find_folder(model), adapter))
    plain, config, adapters = load_backbone(*backbone, default=benchmark.QWEN2_5_HALF_B)
    check_same_input(group, "shape or option", config, modes, streams, prompt, tokens, repeats)
    for P, mode in ((P, mode) for P in streams for mode in modes):
        plan(mode, group, replace(plain.args, streams=P))  # refuses before long work
    rows = []
    turns = len(streams) * len(prompt) * (len(modes) + 1) * (repeats + 1)
    with tqdm(total=turns, desc="measuring", disable=hidden(), leave=False) as bar:
        for P in streams:
            whole = benchmark.with_many_streams(plain, P, adapters)
            for length in prompt:
                sides = measure.measure_shares(
                    whole,
                    modes,
                    group,
                    prompt=length,
                    tokens=tokens,
                    repeats=repeats,
                    turn_done=bar.update,
                )
                alone = sides[measure.ALONE]
                for name, side in sides.items():
                    speed_ups = {
                        f"{k}_speed_up": alone[k] / side[k] for k in ("first_token", "step")
                    }
                    rows.append({"streams": P, "prompt": length, "side": name} | side | speed_ups)
    return {
        "model": model or str(shape or "Qwen2.5-0.5B's shape, random weights"),
        "ranks": group.size(),
        "device": str(mx.default_device()),
        "blas_threads": os.environ.get("OPENBLAS_NUM_THREADS"),
        "tokens": tokens,
        "repeats": repeats,
        "rows": rows,
    }


def print_table(report: dict) -> None:
    """Print what ``measure_all`` gives, and how many times as fast as the whole a share is."""
    threads = f", OPENBLAS_NUM_THREADS={report['blas_threads']}" if report["blas_threads"] else ""
    click.echo(
        f"{report['model']} on {report['ranks']} x {report['device']}{threads}; "
        f"{report['tokens']} tokens decoded, medians of {report['repeats']} turns\n"
    )
    click.echo(
        f"{'P':>3}{'prompt':>7}  {'side':12}{'first token, ms':>20}{'a step, ms':>20}"
        f"{'sent a token, B':>17}{'by formula':>12}{'messages':>10}{'peak MB':>9}"
    )
    for row in report["rows"]:
        sent = "-" if row["sent_bytes"] is None else f"{row['sent_bytes']:,}"
        click.echo(
            f"{row['streams']:>3}{row['prompt']:>7}  {row['side']:12}"
            f"{row['first_token'] * 1e3:>13.1f}{row['first_token_speed_up']:>6.2f}x"
            f"{row['step'] * 1e3:>13.2f}{row['step_speed_up']:>6.2f}x"
            f"{sent:>17}{row['formula_bytes']:>12,}{row['messages']:>10}"
            f"{row['peak_memory'] / 1e6:>9.0f}"
        )
