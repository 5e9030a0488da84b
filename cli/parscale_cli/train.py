"""``parscale train``: a decoder, and then streams over it."""

import dataclasses
import json
from pathlib import Path

import click
from parscale_core.train_settings import DTYPES, INITS, STAGES, TrainSettings

from parscale_cli.errors import with_dashes
from parscale_cli.options.command import command, given, heading, option, refuse
from parscale_cli.options.common import FOLDER, force_option, json_option, output_option
from parscale_cli.options.types import Real, Whole


def _setting(*names: str, **settings):
    return option(*names, of=TrainSettings, **settings)


@command()
@heading("Model")
@_setting("--model", metavar="DIR|NAME", help="The model to start from: a folder or hub name.")
@_setting(
    "--config",
    type=FOLDER,
    metavar="DIR",
    help="Start from nothing but this folder's config.json and tokenizer.",
)
@_setting("--adapter", type=FOLDER, metavar="DIR", help="A stream adapter to start from.")
@option(
    "--stage",
    type=click.Choice(STAGES),
    help="Train a decoder on packed documents, or P streams over one.",
)
@option(
    "--freeze-backbone/--train-all",
    "frozen",
    default=True,
    help="Train prefixes and aggregator only, to an adapter (default), or the whole model.",
)
@_setting("--dtype", type=click.Choice(DTYPES), help="Type of the weights that are trained.")
@heading("Data")
@option(
    "--data",
    multiple=True,
    metavar="PATH|NAME",
    help="Text, JSON lines as mlx-lm takes them, a folder of either, or a hub data set.",
)
@option("--valid", multiple=True, metavar="PATH|NAME", help="Held-out data, as --data.")
@_setting(
    "--hold-out", type=Real(0, 0.5), help="Without --valid, hold out this share of the documents."
)
@_setting("--pattern", help='Which files of a folder, such as "*.py".')
@_setting("--seq-length", type=Whole(1), help="Tokens of a packed window; at most, of a sample.")
@_setting("--truncate", is_flag=True, help="Cut longer samples instead of refusing them.")
@heading("Streams")
@_setting(
    "--streams",
    type=Whole(1, 64),
    metavar="P",
    help="Graft P streams; 1 is a prefix alone, to compare streams with.",
)
@_setting("--prefix-length", type=Whole(1), help="Tokens of the grafted prefixes.")
@_setting(
    "--smoothing", type=Real(0, 1), help="Share of the streams' weights that is spread evenly."
)
@_setting(
    "--init",
    type=click.Choice(INITS),
    help="Make the grafted prefixes from pieces of the training text, or at random.",
)
@_setting(
    "--prefix-projection",
    is_flag=True,
    help="Train a small MLP that makes the prefixes, as PEFT does; the adapter holds what it made.",
)
@_setting(
    "--encoder-hidden-size",
    type=Whole(1),
    help="Size of that MLP's hidden layer.  [default: the model's hidden size]",
)
@heading("Steps")
@_setting("--batch-size", type=Whole(1), help="Sequences at a time, over all machines.")
@_setting("--accumulate", type=Whole(1), help="Batches whose gradients make one step.")
@_setting("--steps", type=Whole(1), help="Steps of the optimiser.")
@_setting("--lr", type=Real(0, min_open=True), help="Learning rate at its peak.")
@_setting(
    "--streams-lr",
    type=Real(0, min_open=True),
    help="The same, of the prefixes.  [default: as --lr]",
)
@_setting(
    "--aggregator-lr",
    type=Real(0, min_open=True),
    help="The same, of the aggregator: where it learns faster than the prefixes, it soon takes one "
    "stream for all.  [default: as --streams-lr]",
)
@_setting("--warmup", type=Whole(0), help="Steps of warm-up.  [default: a twentieth of all]")
@_setting(
    "--final-lr", type=Real(0, 1), help="Where the cosine decay ends, as a share of the peak."
)
@_setting("--weight-decay", type=Real(0), help="AdamW's.")
@_setting("--clip", type=Real(0), help="The gradients' norm at most; 0 for any.")
@_setting(
    "--grad-checkpoint", is_flag=True, help="Compute layers twice instead of keeping their values."
)
@_setting("--seed", type=Whole(0, 2**64 - 1), help="Seed of random numbers.")
@output_option("The run's folder: metrics, checkpoints, and in the end model or adapter.")
@heading("Output")
@option(
    "--resume",
    type=FOLDER,
    metavar="DIR",
    help="Go on with this run from its last checkpoint; takes no other option.",
)
@force_option("Replace the output if it is a run's folder.")
@_setting("--report-every", type=Whole(1), help="Steps from one report to the next.")
@_setting("--eval-every", type=Whole(1), help="Steps from one evaluation to the next.")
@_setting("--eval-sequences", type=Whole(1), help="Evaluate on this many only.  [default: all]")
@_setting("--save-every", type=Whole(1), help="Steps from one checkpoint to the next.")
@_setting("--keep", type=Whole(1), help="Checkpoints to keep.")
@_setting("--report-to", metavar="NAMES", help="Report to wandb, swanlab, or both.")
@_setting("--project-name", metavar="NAME", help="The project's name there.")
@option("--quiet", is_flag=True, help="No progress on standard error.")
@json_option
@click.pass_context
def train(context, resume, force, quiet, as_json, **options):
    """Train a decoder (--stage pretrain), or P streams over one (--stage streams).

    Under mlx.launch, several processes share every batch.
    """
    if resume is not None:
        _refuse_others(context)
    else:
        for name in ("stage", "output"):
            if options[name] is None:
                raise click.UsageError(f"give --{name}, or --resume with a run's folder")
        settings = _settings(context, options)
    from parscale_mlx import training

    if resume is not None:
        result = training.resume(resume, progress=not quiet)
    else:
        result = training.train(settings, force=force, progress=not quiet)
    _print(result, as_json)


def _refuse_others(context) -> None:
    for name, spelt in given(context).items():
        if name not in ("resume", "quiet", "as_json"):
            raise click.UsageError(f"{spelt} cannot go with --resume: a run keeps its settings")


def _settings(context: click.Context, options: dict) -> TrainSettings:
    options["train_all"] = not options.pop("frozen") and options["stage"] == "streams"
    for name in ("data", "valid"):
        # A run may be resumed from another folder.
        paths = [Path(path).expanduser() for path in options[name]]
        options[name] = [
            str(path.resolve()) if path.exists() else given
            for path, given in zip(paths, options[name], strict=True)
        ]
    if options["model"] is not None and Path(options["model"]).expanduser().is_dir():
        options["model"] = str(Path(options["model"]).expanduser().resolve())
    for name in ("config", "adapter"):
        options[name] = options[name] and str(options[name].resolve())
    settings = TrainSettings(**options | {"output": str(options["output"])})
    try:
        settings.check()
    except ValueError as error:
        raise click.UsageError(with_dashes(str(error), context.command.params)) from error
    _check_used(context, settings)
    return settings


def _check_used(context: click.Context, settings: TrainSettings) -> None:
    """Refuse options that this run would ignore."""
    if settings.valid:
        refuse(context, "cannot go with --valid", "hold_out")
    if not any(Path(path).is_dir() for path in (*settings.data, *settings.valid)):
        refuse(context, "needs a folder as --data or --valid", "pattern")
    if settings.streams is None:
        refuse(context, "needs --streams", "prefix_length", "smoothing", "init")
    if settings.stage == "pretrain":
        refuse(context, "needs --stage streams", "frozen")
    if settings.report_to is None:
        refuse(context, "needs --report-to", "project_name")


def _print(result, as_json: bool) -> None:
    from parscale_mlx.training.data_parallel import rank

    if rank():
        return
    if as_json:
        click.echo(json.dumps(dataclasses.asdict(result)))
        return
    click.echo(f"Wrote {result.output}")
    click.echo(f"{result.steps} steps, {result.trained_tokens:,} tokens")
    if result.valid_loss is not None:
        before, after = result.valid_loss_before, result.valid_loss
        click.echo(f"held-out loss {before:.4f} before, {after:.4f} after")
