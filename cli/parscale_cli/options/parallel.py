"""``--parallel``: one model over the processes that ``mlx.launch`` started."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from functools import wraps
from pathlib import Path

import click
from parscale_core.engine.defaults import WATCH_TIMEOUT

from parscale_cli.options.command import option, refuse
from parscale_cli.options.types import Mode, Real


def parallel_option(command: Callable) -> Callable:
    """Add ``--parallel`` to a command that loads its model with ``parallel``.

    Rank 0 alone prints; it prints what makes another rank fail, too.
    """

    @wraps(command)
    def run(*args, parallel, watch_timeout, **options):
        if parallel is None:
            refuse(click.get_current_context(), "needs --parallel", "watch_timeout")
            return command(*args, parallel=None, **options)
        if "-" in options.get("texts", ()):
            raise click.UsageError(
                "--prompt - cannot go with --parallel: the launcher keeps standard input open; "
                "use --prompts-file"
            )
        if options.get("prompt_cache") is not None:
            raise click.UsageError("--prompt-cache cannot go with --parallel")
        with joined(watch_timeout):
            return command(*args, parallel=parallel, **options)

    run = option(
        "--watch-timeout",
        section="Several processes",
        type=Real(1),
        default=WATCH_TIMEOUT,
        metavar="SECONDS",
        help="End all processes when one of them gives no sign of life for so long.",
    )(run)
    return option(
        "--parallel",
        section="Several processes",
        type=Mode(),
        metavar="MODE",
        help="Share the model with the other processes that mlx.launch started: their streams "
        "(streams), their layers (tensor), or SxT for S shares of the streams by T of the layers.",
    )(run)


@contextmanager
def joined(watch_timeout: float = WATCH_TIMEOUT) -> Iterator[None]:
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
