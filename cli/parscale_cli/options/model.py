"""The options that say which model is run, and with which stream adapter."""

from pathlib import Path

import click

from parscale_cli.options.command import option, together
from parscale_cli.options.types import Whole, WholeNumbers

MODEL_HELP = "A model folder or a name on the hub; without it, SmolLM2 with streams."
FOLDER = click.Path(exists=True, file_okay=False, path_type=Path)
FILE = click.Path(exists=True, dir_okay=False, path_type=Path)


def model_option(help: str = MODEL_HELP, **settings):
    """Add ``--model``."""
    return option("--model", section="Model", metavar="DIR|NAME", help=help, **settings)


revision_option = option(
    "--revision", section="Model", help="Branch, tag or commit of a hub repository."
)
_adapters = option(
    "--adapter", "adapters", section="Model", multiple=True, type=FOLDER, metavar="DIR",
    help="A stream adapter over the model; may be given several times, for --streams to pick.",
)  # fmt: skip
# For a command that runs one number of streams, and for one that compares several.
adapter_options = together(
    _adapters,
    option("--streams", section="Model", type=Whole(1, 64), metavar="P",
           help="Run the adapter with P streams, or with 1 the model without streams.  "
                "[default: the most there are; of an export, model.onnx's]"),
)  # fmt: skip
many_streams_options = together(
    _adapters,
    option("--streams", section="Model", type=WholeNumbers("P,P", 64),
           help="Numbers of streams to compare, as 1,4,8.  [default: all that there are]"),
)  # fmt: skip
