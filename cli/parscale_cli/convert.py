"""``parscale convert``: a checkpoint to an MLX folder, or to a published one."""

import dataclasses
import json
from pathlib import Path

import click

Q_OPTIONS = {  # by the option, the field of ``Quantization``
    "q_bits": "bits",
    "q_group_size": "group_size",
    "q_mode": "mode",
    "q_recipe": "recipe",
    "q_windows": "windows",
    "quantize_all": "everything",
}


@click.command()
@click.argument("source", metavar="SOURCE")
@click.option(
    "-o",
    "--output",
    required=True,
    metavar="DIR",
    type=click.Path(path_type=Path),
    help="The folder to write.",
)
@click.option(
    "--to",
    type=click.Choice(["mlx", "hf"]),
    default="mlx",
    show_default=True,
    help="For MLX, or for the published PyTorch classes (never quantised).",
)
@click.option(
    "--mlx-lm",
    "with_model_file",
    is_flag=True,
    help="Add the model's code, so that mlx-lm's commands take it with --trust-remote-code.",
)
@click.option(
    "--dtype",
    type=click.Choice(["float32", "float16", "bfloat16"]),
    help="Type of the weights that are not quantised; by default the stored one.",
)
@click.option("-q", "--quantize", is_flag=True, help="Quantise, all but prefixes and aggregator.")
@click.option(
    "--q-bits",
    type=click.Choice(["2", "3", "4", "5", "6", "8"]),
    help="Bits a weight; by default 4, for mxfp8 8.",
)
@click.option(
    "--q-group-size",
    type=click.Choice(["16", "32", "64", "128"]),
    help="Weights that share a scale; by default 64 for affine, and what the other modes ask for.",
)
@click.option(
    "--q-mode",
    type=click.Choice(["affine", "mxfp4", "nvfp4", "mxfp8"]),
    help="Kind of quantisation.  [default: affine]",
)
@click.option(
    "--q-recipe",
    type=click.Choice(["mixed_2_6", "mixed_3_4", "mixed_3_6", "mixed_4_6", "dynamic", "dwq"]),
    help="mixed: mlx-lm's recipes of two numbers of bits; dynamic: more bits for the half of the "
    "weights that needs them; dwq: scales learnt from the full model.",
)
@click.option(
    "--q-text",
    "q_text_file",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    metavar="FILE",
    help="What dynamic and dwq learn from; by default English that comes with Python.",
)
@click.option(
    "--q-windows",
    type=click.IntRange(4),
    metavar="N",
    help="Windows of 256 tokens that dynamic and dwq learn from.  [default: 64]",
)
@click.option("--quantize-all", is_flag=True, default=None, help="Quantise the aggregator too.")
@click.option(
    "--streams",
    type=click.IntRange(2, 64),
    metavar="P",
    help="Graft P streams onto a plain model, to be trained.",
)
@click.option(
    "--prefix-tokens",
    type=click.IntRange(1),
    metavar="N",
    help="Length of the grafted prefixes.  [default: 48]",
)
@click.option(
    "--text",
    "text_file",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    metavar="FILE",
    help="What the grafted prefixes are made from; by default English that comes with Python.",
)
@click.option("--dry-run", is_flag=True, help="Check the source and say what would be written.")
@click.option("--upload-repo", metavar="OWNER/NAME", help="Upload the result to this repository.")
@click.option("--revision", help="Branch, tag or commit of a hub repository.")
@click.option("--force", is_flag=True, help="Replace the output if it is a model folder.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as a JSON object.")
def convert(source, output, quantize, text_file, q_text_file, prefix_tokens, as_json, **options):
    """Convert a checkpoint to an MLX folder, or with --to hf back to a published one.

    SOURCE is a folder of safetensors or PyTorch pickles, a GGUF file, or a name on the hub.
    """
    asked = {name: options.pop(name) for name in Q_OPTIONS}
    if not quantize:
        _need("--quantize", **asked, q_text=q_text_file)
    if options["streams"] is None:
        _need("--streams", prefix_tokens=prefix_tokens, text=text_file)
    if options["to"] == "hf" and options["with_model_file"]:
        raise click.UsageError("--mlx-lm cannot go with --to hf")
    if options["to"] == "hf" and quantize:
        raise click.UsageError("--quantize cannot go with --to hf: it is MLX's own quantisation")
    from parscale_mlx.convert import convert as run

    result = run(
        source,
        output,
        quantization=_quantization(asked, q_text_file) if quantize else None,
        q_text=_read_text(q_text_file),
        prefix_tokens=prefix_tokens or 48,
        text=_read_text(text_file),
        progress=True,
        **options,
    )
    if as_json:
        click.echo(json.dumps(dataclasses.asdict(result) | {"dry_run": options["dry_run"]}))
    else:
        _print(result, options["dry_run"])


def _quantization(asked: dict, text_file: Path | None):
    from parscale_mlx.quantize import LEARNT, Quantization, check_quantization

    learning = {"--q-text": text_file, "--q-windows": asked["q_windows"]}
    for option, value in learning.items():
        if value is not None and asked["q_recipe"] not in LEARNT:
            raise click.UsageError(f"{option} needs --q-recipe {' or '.join(LEARNT)}")
    given = {name: value for name, value in asked.items() if value is not None}
    fields = {Q_OPTIONS[name]: value for name, value in given.items()}
    for number in ("bits", "group_size"):
        if number in fields:
            fields[number] = int(fields[number])
    try:
        return check_quantization(Quantization(**fields))
    except ValueError as error:
        option = "q_recipe" if "q_recipe" in given else "q_mode"
        name = f"--{option.replace('_', '-')} {given.get(option, 'affine')}"
        raise click.UsageError(f"{name}: {error}") from error


def _need(option: str, **given) -> None:
    for name, value in given.items():
        if value is not None:
            raise click.UsageError(f"--{name.replace('_', '-')} needs {option}")


def _read_text(file: Path | None) -> str | None:
    if file is None:
        return None
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: not UTF-8 text") from error


def _print(result, dry_run: bool) -> None:
    streams = f"{result.streams} stream{'s' if result.streams > 1 else ''}"
    if result.prefix_tokens:
        streams += f" with {result.prefix_tokens} prefix tokens"
    kind = result.dtype
    if result.quantization:
        q = result.quantization
        kind = f"{q['bits']} bits in groups of {q['group_size']} ({q['mode']}), the rest {kind}"
    click.echo(f"{'Would write' if dry_run else 'Wrote'} {result.output}")
    click.echo(f"{result.parameters / 1e6:,.1f} million parameters, {streams}")
    click.echo(f"{kind}: {result.bytes / 1e6:,.1f} MB, {result.bits_per_weight:.2f} bits a weight")
    if result.perplexity is not None:
        click.echo(
            f"perplexity {result.perplexity:.3f}; before grafting {result.base_perplexity:.3f}"
        )
    if result.uploaded_to:
        click.echo(f"Uploaded to {result.uploaded_to}")
