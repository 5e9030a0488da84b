"""The ``parscale`` command. Each subcommand imports MLX or onnxruntime only when it runs."""

import click

from parscale_cli.adapter import adapter
from parscale_cli.bench import bench
from parscale_cli.chat import chat
from parscale_cli.convert import convert
from parscale_cli.cost import cost
from parscale_cli.doctor import doctor
from parscale_cli.errors import one_line_errors
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


class _Commands(click.Group):
    def make_context(self, *args, **settings):
        with one_line_errors():  # --help writes, too
            return super().make_context(*args, **settings)

    def invoke(self, ctx):
        with one_line_errors():
            return super().invoke(ctx)


@click.group(
    cls=_Commands,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(package_name="parscale")
def cli():
    """Run and train ParScale language models with MLX, and export them to ONNX."""


for command in (
    generate, chat, serve, convert, adapter, fuse, train, plot, export_onnx, verify,
    perplexity, evaluate, scaling_law, cost, bench, doctor,
):  # fmt: skip
    cli.add_command(command)
