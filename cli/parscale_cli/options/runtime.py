"""The options that choose what computes, and set it up."""

import click

from parscale_cli.options.command import option, together
from parscale_cli.options.types import Whole

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
    option("--device-id", section="ONNX", type=Whole(0), default=0, show_default=True,
           help="Which CUDA device."),
    option("--threads", section="ONNX", type=Whole(1, 4096),
           help="Threads on the CPU; by default one a core."),
    option("--cuda-graph/--no-cuda-graph", section="ONNX", default=None,
           help="Record the step of one token as a CUDA graph and replay it; "
                "by default with fused operators on CUDA."),
)  # fmt: skip
