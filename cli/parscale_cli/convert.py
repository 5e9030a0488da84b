"""``parscale convert``: a checkpoint to an MLX folder, or to a published one."""

import dataclasses
import json

import click
from parscale_core.convert_settings import (
    DTYPES,
    LEARNT,
    MODES,
    RECIPES,
    ConvertSettings,
    Quantization,
)

from parscale_cli.options.command import argument, command, default_of, heading, option, refuse
from parscale_cli.options.common import folder_options, json_option, layout_option
from parscale_cli.options.types import OneOf, TextFile, Whole

Q_OPTIONS = {  # by the option, the field of ``Quantization``
    "q_bits": "bits",
    "q_group_size": "group_size",
    "q_mode": "mode",
    "q_recipe": "recipe",
    "q_windows": "windows",
    "quantize_all": "everything",
    "q_text": "text",
}


def _quantising(name: str, **settings):
    """An option that is a field of ``Quantization``."""
    default = default_of(Quantization, Q_OPTIONS[name])
    flag = f"--{name.replace('_', '-')}"
    return option(flag, name, default=default, **settings)


def _setting(name: str, **settings):
    """An option that is a field of ``ConvertSettings``."""
    return option(f"--{name.replace('_', '-')}", name, of=ConvertSettings, **settings)


@command()
@argument("source", metavar="SOURCE")
@folder_options("a model folder")
@layout_option
@heading("Output")
@option(
    "--mlx-lm",
    "with_model_file",
    is_flag=True,
    help="Add the model's code, so that mlx-lm's commands take it with --trust-remote-code.",
)
@option(
    "--dtype",
    type=click.Choice(DTYPES),
    help="Type of the weights that are not quantised; by default the stored one.",
)
@option("--dry-run", is_flag=True, help="Check the source and say what would be written.")
@option("--upload-repo", metavar="OWNER/NAME", help="Upload the result to this repository.")
@json_option
@heading("Quantisation")
@option("-q", "--quantize", is_flag=True, help="Quantise, all but prefixes and aggregator.")
@_quantising(
    "q_bits", type=OneOf(2, 3, 4, 5, 6, 8), help="Bits a weight; by default 4, for mxfp8 8."
)
@_quantising(
    "q_group_size",
    type=OneOf(16, 32, 64, 128),
    help="Weights that share a scale; by default 64 for affine, and what the other modes ask for.",
)
@_quantising("q_mode", type=click.Choice(list(MODES)), help="Kind of quantisation.")
@_quantising(
    "q_recipe",
    type=click.Choice(RECIPES),
    help="mixed: mlx-lm's recipes of two numbers of bits; dynamic: more bits for the half of the "
    "weights that needs them; dwq: scales learnt from the full model.",
)
@_quantising(
    "q_text",
    type=TextFile(),
    metavar="FILE",
    help="What dynamic and dwq learn from; by default English that comes with Python.",
)
@_quantising(
    "q_windows",
    type=Whole(4),
    metavar="N",
    help="Windows of 256 tokens that dynamic and dwq learn from.",
)
@_quantising("quantize_all", is_flag=True, help="Quantise the aggregator too.")
@heading("Streams")
@option(
    "--streams",
    type=Whole(2, 64),
    metavar="P",
    help="Graft P streams onto a plain model, to be trained.",
)
@_setting("prefix_length", type=Whole(1), metavar="N", help="Tokens of the grafted prefixes.")
@_setting(
    "text",
    type=TextFile(),
    metavar="FILE",
    help="What the grafted prefixes are made from; by default English that comes with Python.",
)
@click.pass_context
def convert(ctx, source, output, quantize, as_json, **options):
    """Convert a checkpoint to an MLX folder, or with --to hf back to a published one.

    SOURCE is a folder of safetensors or PyTorch pickles, a GGUF file, or a name on the hub.
    """
    asked = {name: options.pop(name) for name in Q_OPTIONS}
    if not quantize:
        refuse(ctx, "needs --quantize", *Q_OPTIONS)
    if options["streams"] is None:
        refuse(ctx, "needs --streams", "prefix_length", "text")
    if options["to"] == "hf" and options["with_model_file"]:
        raise click.UsageError("--mlx-lm cannot go with --to hf")
    if options["to"] == "hf" and quantize:
        raise click.UsageError("--quantize cannot go with --to hf: it is MLX's own quantisation")
    from parscale_mlx.convert import convert as run

    options["quantization"] = _quantization(ctx, asked) if quantize else None
    result = run(source, output, progress=True, **options)
    if as_json:
        click.echo(json.dumps(dataclasses.asdict(result) | {"dry_run": options["dry_run"]}))
    else:
        _print(result, options["dry_run"])


def _quantization(ctx: click.Context, asked: dict) -> Quantization:
    from parscale_mlx.quantize import check_quantization

    if asked["q_recipe"] not in LEARNT:
        refuse(ctx, f"needs --q-recipe {' or '.join(LEARNT)}", "q_text", "q_windows")
    quantization = Quantization(**{field: asked[name] for name, field in Q_OPTIONS.items()})
    try:
        check_quantization(quantization)
    except ValueError as error:
        name = "q_mode" if asked["q_recipe"] is None else "q_recipe"
        raise click.UsageError(f"--{name.replace('_', '-')} {asked[name]}: {error}") from error
    return quantization


def _print(result, dry_run: bool) -> None:
    streams = f"{result.streams} stream{'s' if result.streams > 1 else ''}"
    if result.prefix_length:
        streams += f" with {result.prefix_length} prefix tokens"
    kind = result.dtype
    if result.quantization:
        q = result.quantization
        own = {layer["bits"] for layer in q.values() if isinstance(layer, dict)}
        bits = " and ".join(map(str, sorted({q["bits"]} | own)))
        kind = f"{bits} bits in groups of {q['group_size']} ({q['mode']}), the rest {kind}"
    click.echo(f"{'Would write' if dry_run else 'Wrote'} {result.output}")
    click.echo(f"{result.parameters / 1e6:,.1f} million parameters, {streams}")
    click.echo(f"{kind}: {result.bytes / 1e6:,.1f} MB, {result.bits_per_weight:.2f} bits a weight")
    if result.perplexity is not None:
        click.echo(
            f"perplexity {result.perplexity:.3f}; before grafting {result.base_perplexity:.3f}"
        )
    if result.uploaded_to:
        click.echo(f"Uploaded to {result.uploaded_to}")
