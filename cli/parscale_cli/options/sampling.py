"""The options that say how tokens are chosen, shared by the commands that generate."""

from dataclasses import replace

import click
from parscale_core.engine import Sampling

from parscale_cli.options.command import option, refuse, take, together
from parscale_cli.options.types import Real, Whole


def _sampling(*names: str, **settings):
    return option(*names, section="Sampling", of=Sampling, **settings)


sampling_options = together(
    _sampling("-n", "--max-tokens", type=Whole(1), help="Tokens to generate at most."),
    _sampling("--temp", "temperature", type=Real(0),
              help="Sampling temperature; 0 takes the likeliest token."),
    _sampling("--top-p", type=Real(0, 1, min_open=True),
              help="Sample from the likeliest tokens that together have this probability."),
    _sampling("--top-k", type=Whole(0),
              help="Sample from this many likeliest tokens; 0 for all."),
    _sampling("--min-p", type=Real(0, 1),
              help="Leave out tokens less likely than this share of the likeliest."),
    _sampling("--repetition-penalty", type=Real(0, min_open=True),
              help="Divide the logits of recent tokens by this."),
    _sampling("--repetition-context", type=Whole(1),
              help="How many recent tokens the penalties look at."),
    _sampling("--presence-penalty", type=Real(),
              help="Subtract this from the logits of recent tokens."),
    _sampling("--frequency-penalty", type=Real(),
              help="Subtract this for every time a token occurred recently."),
    _sampling("--seed", type=Whole(-(2**63), 2**64 - 1),
              help="Seed of each answer's random numbers, of 64 bits."),
    option("--stop", section="Sampling", multiple=True, metavar="TEXT",
           help="Stop before this text; may be given several times."),
)  # fmt: skip


def take_sampling(ctx: click.Context, options: dict) -> Sampling:
    """Move the sampling options out of a command's keyword arguments.

    Raises:
        click.UsageError: one would be ignored, or is out of its range.
    """
    from parscale_core.engine.check import check_sampling

    sampling = Sampling(**take(Sampling, options))
    if sampling.temperature == 0:
        refuse(ctx, "needs --temp above 0", "top_p", "top_k", "min_p")
    if not (
        sampling.repetition_penalty != 1 or sampling.presence_penalty or sampling.frequency_penalty
    ):
        refuse(ctx, "needs one of the penalties", "repetition_context")
    context = sampling.repetition_context
    sampling = replace(sampling, presence_context=context, frequency_context=context)
    try:
        check_sampling(sampling)
    except ValueError as error:
        raise click.UsageError(f"--{str(error).replace('_', '-', 1)}") from error
    return sampling
