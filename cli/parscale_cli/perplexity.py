"""``parscale perplexity``: how well models predict held-out text."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from math import isfinite
from typing import TYPE_CHECKING, Any

import click
from parscale_core.error_text import not_finite

from parscale_cli.engines import choose_runtime, find_export
from parscale_cli.options.command import argument, command, heading, option
from parscale_cli.options.common import (
    FILE,
    json_option,
    many_streams_options,
    model_option,
    runtime_option,
)
from parscale_cli.options.parallel import parallel_option
from parscale_cli.options.types import Real, Whole

if TYPE_CHECKING:
    from parscale_core.analysis.perplexity import Report

ENOUGH = 2048


@dataclass
class Scorer:
    """A model that tells the losses of given tokens, whichever engine runs it.

    Attributes:
        context: tokens of a text at most; None for no end.
        losses: of texts' tokens but the first, in nats.
        group: the processes that share the model, if several do.
    """

    tokenizer: Any
    context: int | None
    losses: Callable[[list[list[int]]], list[list[float]]]
    group: Any = None


@command()
@argument("files", nargs=-1, required=True, type=FILE, metavar="FILE...")
@model_option(
    "A model folder, a name on the hub, or an export made with --all-logits; without it, "
    "SmolLM2 with streams."
)
@many_streams_options
@runtime_option
@heading("Text")
@option(
    "--window",
    type=Whole(2),
    help=f"Tokens to read at once.  [default: {ENOUGH}, or the model's context if that is shorter]",
)
@option(
    "--stride",
    type=Whole(1),
    help="Tokens from one window's beginning to the next.  [default: half a window]",
)
@option("--batch-size", type=Whole(1), default=1, help="Windows to compute at a time.")
@option("--limit", type=Whole(1), metavar="N", help="Read the first N windows only.")
@heading("Output")
@option(
    "--level",
    type=Real(0, 1, min_open=True, max_open=True),
    default=0.95,
    help="Level of the confidence intervals.",
)
@json_option
@parallel_option
def perplexity(
    files, model, adapters, streams, runtime, parallel, window, stride, batch_size, limit, level,
    as_json,
):  # fmt: skip
    """Print models' perplexity on held-out text, with a confidence interval.

    A FILE is one document, or of a .jsonl file each line is one: a string or {"text": ...}.
    """
    from parscale_core.analysis.perplexity import report
    from parscale_core.evaluation.text import read_documents, windows

    documents = [document for file in files for document in read_documents(file)]
    losses: dict[int, list[float]] = {}
    for count, scorer in _scorers(model, adapters, streams, runtime, parallel):
        size = window or min(ENOUGH, scorer.context or ENOUGH)
        if scorer.context is not None and size > scorer.context:
            raise click.UsageError(
                f"--window {window} is longer than the model's context of {scorer.context}"
            )
        step = stride or max(1, size // 2)
        if step >= size:
            raise click.UsageError(f"--stride {step} would leave tokens out of windows of {size}")
        parts = list(windows(documents, scorer.tokenizer.encode, size, step))[:limit]
        if not parts:
            raise ValueError(f"{', '.join(map(str, files))}: no text of two tokens or more")
        if scorer.group is not None:
            from parscale_mlx.parallel.ranks import check_same_input

            tokens = [part.tokens for part in parts]
            check_same_input(scorer.group, "text or batch size", tokens, batch_size)
        losses[count] = list(_window_losses(scorer, parts, batch_size, f"P={count}"))
    scored = [part.tokens[-part.scored :] for part in parts]
    n_bytes = sum(len(scorer.tokenizer.decode(tokens).encode()) for tokens in scored)
    _print(report(losses, parts, n_bytes, level), as_json)


def _scorers(model, adapters, streams, runtime, parallel) -> Iterator[tuple[int, Scorer]]:
    if choose_runtime(model, runtime) == "onnx":
        if parallel:
            raise click.UsageError("--parallel is an option of --runtime mlx")
        yield from _onnx_scorers(model, adapters, streams)
        return
    from parscale_mlx.engine.opening import plain_weights_are_better
    from parscale_mlx.load import open_models
    from parscale_mlx.token_losses import token_losses

    from parscale_core.checkpoint.folder import find_folder
    from parscale_core.checkpoint.packaged import DEFAULT

    folder = find_folder(model or DEFAULT)
    models, tokenizer = open_models(
        folder,
        adapters,
        streams or (),
        parallel=parallel,
        dequantize=parallel is None and plain_weights_are_better(folder),
    )
    for count, loaded in models.items():
        context = loaded.args.max_position_embeddings
        group = loaded.parallel.group if loaded.parallel is not None else None
        yield count, Scorer(tokenizer, context, partial(token_losses, loaded), group)


def _onnx_scorers(model: str | None, adapters, streams) -> Iterator[tuple[int, Scorer]]:
    from parscale_export import OnnxModel
    from parscale_export.runtime.opening import load_tokenizer
    from parscale_export.runtime.scoring import token_losses
    from parscale_export.runtime.session import find_graphs

    path = find_export(model, adapters, all_logits=True)
    tokenizer = load_tokenizer(path if path.is_dir() else path.parent)
    for count in streams or find_graphs(path):
        opened = OnnxModel(path, streams=count)
        yield count, Scorer(tokenizer, opened.context_length, partial(token_losses, opened))


def _window_losses(scorer: Scorer, parts: list, batch_size: int, name: str) -> Iterator[float]:
    from parscale_core.progress import progress_bar

    with progress_bar(name, len(parts), " windows") as bar:
        for begin in range(0, len(parts), batch_size):
            batch = parts[begin : begin + batch_size]
            rows = scorer.losses([part.tokens for part in batch])
            for part, row in zip(batch, rows, strict=True):
                loss = sum(row[-part.scored :])
                if not isfinite(loss):
                    raise ArithmeticError(not_finite(f"{name}: the losses have"))
                yield loss
            bar.update(len(batch))


def _print(report: "Report", as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(report.as_dict()))
        return
    counted = {"document": report.documents, "window": report.windows, "token": report.tokens}
    counts = ", ".join(f"{n} {noun}{'s' * (n != 1)}" for noun, n in counted.items())
    click.echo(f"{counts} scored; {report.level:.0%} intervals over {report.resampled}")
    first = report.scores[0].streams
    width = 28
    head = f"{'P':>3}{'perplexity':>{width}}{'bits/byte':>11}"
    click.echo(head + (f"{f'times that of P={first}':>{width}}" if report.scores[1:] else ""))
    for score in report.scores:
        line = f"{score.streams:>3}{_between(score.perplexity, score.interval, 3):>{width}}"
        line += f"{score.bits_per_byte:>11.4f}"
        if score.times is not None:
            line += f"{_between(score.times, score.times_interval, 4):>{width}}"
        click.echo(line)


def _between(value: float, interval, digits: int) -> str:
    if interval is None:
        return f"{value:.{digits}f}"
    return f"{value:.{digits}f} [{interval.low:.{digits}f}, {interval.high:.{digits}f}]"
