"""The options that say how tokens are chosen, shared by the commands that generate."""

from collections.abc import Callable
from dataclasses import dataclass, fields

import click


@dataclass
class Sampling:
    """How to choose tokens and when to stop; temperature 0 is greedy decoding."""

    max_tokens: int
    temp: float
    top_p: float
    top_k: int
    min_p: float
    repetition_penalty: float | None
    repetition_context: int
    presence_penalty: float | None
    frequency_penalty: float | None
    seed: int | None
    stop: tuple[str, ...]


OPTIONS = (
    click.option("-n", "--max-tokens", type=click.IntRange(1), default=256, show_default=True,
                 help="Tokens to generate at most."),
    click.option("--temp", type=click.FloatRange(0), default=0.0, show_default=True,
                 help="Sampling temperature; 0 takes the likeliest token."),
    click.option("--top-p", type=click.FloatRange(0, 1, min_open=True), default=1.0,
                 show_default=True,
                 help="Sample from the likeliest tokens that together have this probability."),
    click.option("--top-k", type=click.IntRange(0), default=0, show_default=True,
                 help="Sample from this many likeliest tokens; 0 for all."),
    click.option("--min-p", type=click.FloatRange(0, 1), default=0.0, show_default=True,
                 help="Leave out tokens less likely than this share of the likeliest."),
    click.option("--repetition-penalty", type=click.FloatRange(0, min_open=True),
                 help="Divide the logits of recent tokens by this."),
    click.option("--repetition-context", type=click.IntRange(1), default=20, show_default=True,
                 help="How many recent tokens the penalties look at."),
    click.option("--presence-penalty", type=float,
                 help="Subtract this from the logits of recent tokens."),
    click.option("--frequency-penalty", type=float,
                 help="Subtract this for every time a token occurred recently."),
    click.option("--seed", type=click.IntRange(0), help="Seed of the random numbers."),
    click.option("--stop", multiple=True, metavar="TEXT",
                 help="Stop before this text; may be given several times."),
)  # fmt: skip


def sampling_options(command: Callable) -> Callable:
    """Add the options of ``Sampling`` to a Click command."""
    for option in reversed(OPTIONS):
        command = option(command)
    return command


def take_sampling(options: dict) -> Sampling:
    """Move the sampling options out of a command's keyword arguments."""
    return Sampling(**{field.name: options.pop(field.name) for field in fields(Sampling)})
