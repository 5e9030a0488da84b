"""The ``parscale`` command. Each subcommand imports MLX or onnxruntime only when it runs."""

import errno
import os

import click

from parscale_cli.adapter import adapter
from parscale_cli.bench import bench
from parscale_cli.chat import chat
from parscale_cli.convert import convert
from parscale_cli.cost import cost
from parscale_cli.doctor import doctor
from parscale_cli.evaluate import evaluate
from parscale_cli.export_onnx import export_onnx
from parscale_cli.fuse import fuse
from parscale_cli.generate import generate
from parscale_cli.perplexity import perplexity
from parscale_cli.plot import plot
from parscale_cli.scaling_law import scaling_law
from parscale_cli.serve import serve
from parscale_cli.train import train
from parscale_cli.verify import verify

DEBUG = "PARSCALE_DEBUG"
_FAILURES = (OSError, ValueError, ArithmeticError, ImportError, RuntimeError, MemoryError)


class _OneLineErrors(click.Group):
    def invoke(self, ctx):
        try:
            return super().invoke(ctx)
        except _FAILURES as error:
            # A closed pipe and Click's own control flow are Click's to handle.
            if isinstance(error, click.exceptions.Exit | click.exceptions.Abort):
                raise
            if isinstance(error, OSError) and error.errno == errno.EPIPE:
                raise
            if os.environ.get(DEBUG):
                raise
            text = " ".join(str(error).split()) or type(error).__name__
            raise click.ClickException(text) from error


@click.group(cls=_OneLineErrors, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="parscale")
def cli():
    """Run and train ParScale language models with MLX, and export them to ONNX."""


for command in (
    generate, chat, serve, convert, adapter, fuse, train, plot, export_onnx, verify,
    perplexity, evaluate, scaling_law, cost, bench, doctor,
):  # fmt: skip
    cli.add_command(command)
