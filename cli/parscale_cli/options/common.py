"""Options of several commands: model, runtime, KV cache, output."""

from pathlib import Path

import click
from parscale_core.analysis.figures import FORMATS, check_figure
from parscale_core.engine import CacheOptions, Request

from parscale_cli.options.command import default_of, option, together
from parscale_cli.options.types import OneOf, Whole, WholeNumbers

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

runtime_option = option(
    "--runtime", section="Model", type=click.Choice(["mlx", "onnx"]),
    help="What computes; by default onnx for a folder that export-onnx wrote. "
         "onnx exports another model once, into the user's cache folder.",
)  # fmt: skip
provider_option = option(
    "--provider", section="ONNX", metavar="NAME",
    help="cpu, cuda or an execution provider's full name; by default CUDA where it works.",
)  # fmt: skip
check_option = option(
    "--no-check", "check", section="ONNX", is_flag=True, flag_value=False, default=True,
    help="Do not compare an export's data files with the hashes in its graph.",
)  # fmt: skip
runtime_options = together(
    runtime_option,
    provider_option,
    check_option,
    option("--device-id", section="ONNX", type=Whole(0), default=0,
           help="Which CUDA device."),
    option("--threads", section="ONNX", type=Whole(1, 4096),
           help="Threads on the CPU; by default one a core."),
    option("--cuda-graph/--no-cuda-graph", section="ONNX", default=None,
           help="Record the step of one token as a CUDA graph and replay it; "
                "by default with fused operators on CUDA."),
)  # fmt: skip


def _cache_option(field: str, *names: str, **settings):
    default = default_of(CacheOptions, field)
    return option(*names, section="KV cache", default=default, **settings)


max_kv_size_option = _cache_option(
    "max_size", "--max-kv-size", type=Whole(5),
    help="Keep about this many tokens in a rotating KV cache, besides the prefix.",
)  # fmt: skip
quantised_cache_options = together(
    _cache_option("bits", "--kv-bits", type=OneOf(2, 3, 4, 5, 6, 8),
        help="Quantise KV caches to this many bits. Answers then come one at a time."),
    _cache_option("group_size", "--kv-group-size", type=OneOf(32, 64, 128),
        help="Numbers of a KV cache that are quantised together."),
    _cache_option("quantized_start", "--quantized-kv-start", type=Whole(0),
        help="Quantise a KV cache once it holds this many tokens."),
)  # fmt: skip
num_draft_tokens_option = option(
    "--num-draft-tokens", section="Drafts", of=Request, type=Whole(1, 64),
    help="Tokens to draft at a time.",
)  # fmt: skip

json_option = option(
    "--json", "as_json", section="Output", is_flag=True, help="Print JSON instead of text."
)


def output_option(help: str = "The folder to write.", *, folder: bool = True, **settings):
    """Add ``--output``: a folder, or a file."""
    kind = click.Path(path_type=Path) if folder else click.Path(dir_okay=False, path_type=Path)
    settings = {"section": "Output", "metavar": "DIR" if folder else "FILE"} | settings
    return option("-o", "--output", type=kind, help=help, **settings)


def force_option(help: str):
    """Add ``--force``."""
    return option("--force", section="Output", is_flag=True, help=help)


layout_option = option(
    "--to", section="Output", type=click.Choice(["mlx", "hf"]), default="mlx",
    help="MLX's layout, or what the published PyTorch classes load (never quantised).",
)  # fmt: skip


def folder_options(kind: str):
    """Add what the commands have that write a folder of this kind, from a folder or the hub."""
    return together(
        revision_option,
        output_option(required=True),
        force_option(f"Replace the output if it is {kind}."),
    )


def plot_option(what: str):
    """Add ``--plot FILE``; see ``check_plot`` and ``parscale_core.analysis.figures``."""
    return option(
        "--plot",
        section="Output",
        metavar="FILE",
        type=click.Path(dir_okay=False, path_type=Path),
        help=f"Draw {what} into this file, {', '.join(FORMATS)} by its ending.",
    )


def check_plot(file: Path | None, *, force: bool, option: str = "--plot") -> None:
    """Find out before the work whether ``file`` can be written.

    Raises:
        click.UsageError: its ending names no format, or ``force`` without a plot.
        OSError, ImportError: as ``check_figure``.
    """
    if file is None:
        if force:
            raise click.UsageError("--force needs --plot: there is nothing else to replace")
        return
    try:
        check_figure(file, force=force)
    except ValueError as error:
        raise click.UsageError(f"{option} {error}") from error
