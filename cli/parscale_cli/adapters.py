"""The options that say which stream adapter a model is run with."""

from collections.abc import Callable
from pathlib import Path

import click

from parscale_cli.quantities import WholeNumbers


def many_streams_options(command: Callable) -> Callable:
    """Add ``--adapter`` and ``--streams`` to a Click command that compares numbers of streams."""
    command = click.option(
        "--streams",
        type=WholeNumbers("P,P", 64),
        help="Numbers of streams to compare, as 1,4,8.  [default: all that there are]",
    )(command)
    return _adapter_option(command)


def adapter_options(command: Callable) -> Callable:
    """Add ``--adapter`` and ``--streams`` to a Click command."""
    command = click.option(
        "--streams",
        type=click.IntRange(1, 64),
        metavar="P",
        help="Run the adapter with P streams, or with 1 the model without streams.  "
        "[default: the most there are; of an export, model.onnx's]",
    )(command)
    return _adapter_option(command)


def _adapter_option(command: Callable) -> Callable:
    return click.option(
        "--adapter",
        "adapters",
        multiple=True,
        type=click.Path(exists=True, file_okay=False, path_type=Path),
        metavar="DIR",
        help="A stream adapter over the model; may be given several times, for --streams to pick.",
    )(command)
