"""The options that say what becomes of a result."""

from pathlib import Path

import click

from parscale_cli.options.command import option, together
from parscale_cli.options.model import revision_option

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


def folder_options(kind: str):
    """Add what the commands have that write a folder of this kind, from a folder or the hub."""
    return together(
        revision_option,
        output_option(required=True),
        force_option(f"Replace the output if it is {kind}."),
    )
