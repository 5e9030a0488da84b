"""``parscale convert``: a checkpoint to an MLX folder, or to a published one."""

import dataclasses
import json
from pathlib import Path

import click


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
@click.option("--quantize-all", is_flag=True, help="Quantise the aggregator too.")
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
def convert(
    source, output, q_bits, q_group_size, q_mode, text_file, prefix_tokens, as_json, **options
):
    """Convert a checkpoint to an MLX folder, or with --to hf back to a published one.

    SOURCE is a folder of safetensors or PyTorch pickles, a GGUF file, or a name on the hub.
    """
    if not options["quantize"]:
        _need("--quantize", q_bits=q_bits, q_group_size=q_group_size, q_mode=q_mode)
        _need("--quantize", quantize_all=options["quantize_all"] or None)
    if options["streams"] is None:
        _need("--streams", prefix_tokens=prefix_tokens, text=text_file)
    if options["to"] == "hf" and options["with_model_file"]:
        raise click.UsageError("--mlx-lm cannot go with --to hf")
    if options["to"] == "hf" and options["quantize"]:
        raise click.UsageError("--quantize cannot go with --to hf: it is MLX's own quantisation")
    from parscale_mlx.convert import check_quantization
    from parscale_mlx.convert import convert as run

    bits, group_size = q_bits and int(q_bits), q_group_size and int(q_group_size)
    if options["quantize"]:
        try:
            check_quantization(bits, group_size, q_mode or "affine")
        except ValueError as error:
            raise click.UsageError(f"--q-mode {q_mode or 'affine'}: {error}") from error
    result = run(
        source,
        output,
        q_bits=bits,
        q_group_size=group_size,
        q_mode=q_mode or "affine",
        prefix_tokens=prefix_tokens or 48,
        text=_read_text(text_file),
        progress=True,
        **options,
    )
    if as_json:
        click.echo(json.dumps(dataclasses.asdict(result) | {"dry_run": options["dry_run"]}))
    else:
        _print(result, options["dry_run"])


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
