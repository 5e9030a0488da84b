"""``--parallel``: one model over the processes that ``mlx.launch`` started."""

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from functools import wraps
from pathlib import Path

import click


class Mode(click.ParamType):
    name = "mode"

    def convert(self, value, param, ctx):
        if value in ("streams", "tensor") or re.fullmatch(r"[1-9]\d{0,3}x[1-9]\d{0,3}", value):
            return value
        return self.fail(
            "streams, tensor or SxT (4x2: four shares of the streams, two of the layers)",
            param,
            ctx,
        )


class Modes(click.ParamType):
    """Modes with commas between: streams,tensor; a tuple, each once."""

    name = "modes"

    def convert(self, value, param, ctx) -> tuple[str, ...]:
        if isinstance(value, tuple):
            return value
        return tuple(dict.fromkeys(Mode().convert(mode, param, ctx) for mode in value.split(",")))


def parallel_option(command: Callable) -> Callable:
    """Add ``--parallel`` to a command that loads its model with ``parallel``.

    Rank 0 alone prints; it prints what makes another rank fail, too.
    """

    @wraps(command)
    def run(*args, parallel, watch_timeout, **options):
        if parallel is None:
            return command(*args, parallel=None, **options)
        if "-" in options.get("texts", ()):
            raise click.UsageError(
                "--prompt - cannot go with --parallel: the launcher keeps standard input open; "
                "use --prompts-file"
            )
        if options.get("prompt_cache") is not None:
            raise click.UsageError("--prompt-cache cannot go with --parallel")
        with together(watch_timeout):
            return command(*args, parallel=parallel, **options)

    run = click.option(
        "--watch-timeout",
        type=click.FloatRange(1),
        default=60.0,
        show_default=True,
        metavar="SECONDS",
        help="--parallel: end all processes when one of them gives no sign of life for so long.",
    )(run)
    return click.option(
        "--parallel",
        type=Mode(),
        metavar="MODE",
        help="Share the model with the other processes that mlx.launch started: their streams "
        "(streams), their layers (tensor), or SxT for S shares of the streams by T of the layers.",
    )(run)


@contextmanager
def together(watch_timeout: float = 60.0) -> Iterator[None]:
    """What every rank runs: rank 0 alone prints, and an error of any is said once.

    Raises:
        click.UsageError: this process is the only one.
    """
    from parscale_mlx.parallel.ranks import join
    from parscale_mlx.parallel.watch import watched

    import mlx.core as mx

    if mx.distributed.init().size() == 1:
        raise click.UsageError(
            "--parallel: this is the only process; start several: mlx.launch -n 2 -- parscale ..."
        )
    group = join()
    with watched(group, watch_timeout):
        if group.rank() == 0:
            yield
            return
        with (
            Path(os.devnull).open("w") as nowhere,
            redirect_stdout(nowhere),
            redirect_stderr(nowhere),
        ):
            yield
