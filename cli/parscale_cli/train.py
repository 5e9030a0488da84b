"""``parscale train``: a decoder, and then streams over it."""

import dataclasses
import json
from pathlib import Path

import click
from click.core import ParameterSource

from parscale_cli.options.command import command

READABLE = click.Path(exists=True, file_okay=False, path_type=Path)


@command()
@click.option(
    "--stage",
    type=click.Choice(["pretrain", "streams"]),
    help="Train a decoder on packed documents, or P streams over one.",
)
@click.option("--model", metavar="DIR|NAME", help="The model to start from: a folder or hub name.")
@click.option(
    "--config",
    type=READABLE,
    metavar="DIR",
    help="Start from nothing but this folder's config.json and tokenizer.",
)
@click.option("--adapter", type=READABLE, metavar="DIR", help="A stream adapter to start from.")
@click.option(
    "--data",
    multiple=True,
    metavar="PATH|NAME",
    help="Text, JSON lines as mlx-lm takes them, a folder of either, or a hub data set.",
)
@click.option("--valid", multiple=True, metavar="PATH|NAME", help="Held-out data, as --data.")
@click.option(
    "--hold-out",
    type=click.FloatRange(0, 0.5),
    default=0.05,
    show_default=True,
    help="Without --valid, hold out this share of the documents.",
)
@click.option(
    "--pattern", default="*", show_default=True, help='Which files of a folder, such as "*.py".'
)
@click.option(
    "-o",
    "--output",
    metavar="DIR",
    type=click.Path(path_type=Path),
    help="The run's folder: metrics, checkpoints, and in the end model or adapter.",
)
@click.option(
    "--resume",
    type=READABLE,
    metavar="DIR",
    help="Go on with this run from its last checkpoint; takes no other option.",
)
@click.option(
    "--freeze-backbone/--train-all",
    "frozen",
    default=True,
    help="Train prefixes and aggregator only, to an adapter (default), or the whole model.",
)
@click.option("--streams", type=click.IntRange(1, 64), metavar="P",
    help="Graft P streams; 1 is a prefix alone, to compare streams with.",
)  # fmt: skip
@click.option(
    "--prefix-tokens", type=click.IntRange(1), default=48, show_default=True,
    help="Length of the grafted prefixes.",
)  # fmt: skip
@click.option(
    "--smooth", type=click.FloatRange(0, 1), default=0.01, show_default=True,
    help="Share of the streams' weights that is spread evenly.",
)  # fmt: skip
@click.option(
    "--init",
    type=click.Choice(["text", "random"]),
    default="text",
    show_default=True,
    help="Make the grafted prefixes from pieces of the training text, or at random.",
)
@click.option(
    "--prefix-projection", is_flag=True,
    help="Train a small MLP that makes the prefixes, as PEFT does; the adapter holds what it made.",
)  # fmt: skip
@click.option(
    "--encoder-hidden-size", type=click.IntRange(1),
    help="Size of that MLP's hidden layer.  [default: the model's hidden size]",
)  # fmt: skip
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16", "float16"]),
    default="float32",
    show_default=True,
    help="Type of the weights that are trained.",
)
@click.option(
    "--seq-length", type=click.IntRange(1), default=512, show_default=True,
    help="Tokens of a packed window; at most, of a sample.",
)  # fmt: skip
@click.option("--truncate", is_flag=True, help="Cut longer samples instead of refusing them.")
@click.option(
    "--batch-size", type=click.IntRange(1), default=8, show_default=True,
    help="Sequences at a time, over all machines.",
)  # fmt: skip
@click.option(
    "--accumulate", type=click.IntRange(1), default=1, show_default=True,
    help="Batches whose gradients make one step.",
)  # fmt: skip
@click.option("--steps", type=click.IntRange(1), default=1000, show_default=True)
@click.option(
    "--lr", type=click.FloatRange(0, min_open=True), default=3e-4, show_default=True,
    help="Learning rate at its peak.",
)  # fmt: skip
@click.option(
    "--streams-lr", type=click.FloatRange(0, min_open=True),
    help="The same, of the prefixes.  [default: as --lr]",
)  # fmt: skip
@click.option(
    "--aggregator-lr", type=click.FloatRange(0, min_open=True),
    help="The same, of the aggregator: where it learns faster than the prefixes, it soon takes one "
    "stream for all.  [default: as --streams-lr]",
)  # fmt: skip
@click.option(
    "--warmup", type=click.IntRange(0), help="Steps of warm-up.  [default: a twentieth of all]"
)
@click.option(
    "--final-lr", type=click.FloatRange(0, 1), default=0.1, show_default=True,
    help="Where the cosine decay ends, as a share of the peak.",
)  # fmt: skip
@click.option("--weight-decay", type=click.FloatRange(0), default=0.1, show_default=True)
@click.option(
    "--clip", type=click.FloatRange(0), default=1.0, show_default=True,
    help="The gradients' norm at most; 0 for any.",
)  # fmt: skip
@click.option(
    "--grad-checkpoint", is_flag=True, help="Compute layers twice instead of keeping their values."
)
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True)
@click.option("--report-every", type=click.IntRange(1), default=10, show_default=True)
@click.option("--eval-every", type=click.IntRange(1), default=200, show_default=True)
@click.option(
    "--eval-sequences", type=click.IntRange(1), help="Evaluate on this many only.  [default: all]"
)
@click.option("--save-every", type=click.IntRange(1), default=200, show_default=True)
@click.option(
    "--keep", type=click.IntRange(1), default=3, show_default=True, help="Checkpoints to keep."
)
@click.option("--report-to", metavar="NAMES", help="Report to wandb, swanlab, or both.")
@click.option("--project-name", metavar="NAME", help="The project's name there.")
@click.option("--force", is_flag=True, help="Replace the output if it is a run's folder.")
@click.option("--quiet", is_flag=True, help="No progress on standard error.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as a JSON object.")
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
    from parscale_mlx import training

    if resume is not None:
        result = training.resume(resume, progress=not quiet)
    else:
        settings = _settings(training.TrainSettings, options)
        result = training.train(settings, force=force, progress=not quiet)
    _print(result, as_json)


def _refuse_others(context) -> None:
    allowed = {"resume", "quiet", "as_json"}
    for parameter in context.command.params:
        given = context.get_parameter_source(parameter.name) == ParameterSource.COMMANDLINE
        if given and parameter.name not in allowed:
            raise click.UsageError(
                f"{parameter.opts[0]} cannot go with --resume: a run keeps its settings"
            )


def _settings(kind, options: dict):
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
    settings = kind(**options | {"output": str(options["output"])})
    try:
        settings.check()
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    return settings


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
