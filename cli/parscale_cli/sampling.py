"""The options that say how tokens are chosen, shared by the commands that generate."""

from collections.abc import Callable
from dataclasses import replace

import click
from parscale_core.engine import Sampling

DEFAULT = Sampling()

OPTIONS = (
    click.option("-n", "--max-tokens", type=click.IntRange(1), default=DEFAULT.max_tokens,
                 show_default=True, help="Tokens to generate at most."),
    click.option("--temp", "temperature", type=click.FloatRange(0), default=DEFAULT.temperature,
                 show_default=True, help="Sampling temperature; 0 takes the likeliest token."),
    click.option("--top-p", type=click.FloatRange(0, 1, min_open=True), default=DEFAULT.top_p,
                 show_default=True,
                 help="Sample from the likeliest tokens that together have this probability."),
    click.option("--top-k", type=click.IntRange(0), default=DEFAULT.top_k, show_default=True,
                 help="Sample from this many likeliest tokens; 0 for all."),
    click.option("--min-p", type=click.FloatRange(0, 1), default=DEFAULT.min_p, show_default=True,
                 help="Leave out tokens less likely than this share of the likeliest."),
    click.option("--repetition-penalty", type=click.FloatRange(0, min_open=True),
                 default=DEFAULT.repetition_penalty, show_default=True,
                 help="Divide the logits of recent tokens by this."),
    click.option("--repetition-context", type=click.IntRange(1),
                 default=DEFAULT.repetition_context, show_default=True,
                 help="How many recent tokens the penalties look at."),
    click.option("--presence-penalty", type=float, default=DEFAULT.presence_penalty,
                 show_default=True, help="Subtract this from the logits of recent tokens."),
    click.option("--frequency-penalty", type=float, default=DEFAULT.frequency_penalty,
                 show_default=True,
                 help="Subtract this for every time a token occurred recently."),
    click.option("--seed", type=click.IntRange(-(2**63), 2**64 - 1),
                 help="Seed of each answer's random numbers, of 64 bits."),
)  # fmt: skip
NAMES = ("max_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty",
         "repetition_context", "presence_penalty", "frequency_penalty", "seed")  # fmt: skip


def sampling_options(command: Callable) -> Callable:
    """Add ``--stop`` and the options of ``Sampling`` to a Click command."""
    command = click.option(
        "--stop",
        multiple=True,
        metavar="TEXT",
        help="Stop before this text; may be given several times.",
    )(command)
    for option in reversed(OPTIONS):
        command = option(command)
    return command


def take_sampling(options: dict) -> Sampling:
    """Move the sampling options out of a command's keyword arguments.

    Raises:
        click.UsageError: one is not a finite number.
    """
    from parscale_core.engine.check import check_sampling

    sampling = replace(DEFAULT, **{name: options.pop(name) for name in NAMES})
    context = sampling.repetition_context
    sampling = replace(sampling, presence_context=context, frequency_context=context)
    try:
        check_sampling(sampling)
    except ValueError as error:
        raise click.UsageError(f"--{str(error).replace('_', '-', 1)}") from error
    return sampling
