"""Perplexity of a model under each way of quantising it, on text that none of them learnt from.

Every side is converted and measured in a process of its own. The text is English that comes with
Python (the topics of its ``help()``): its beginning is learnt from, its end is measured.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import click

WINDOW = 256


def measure(folder: Path, windows: int) -> dict:
    """Perplexity over the last windows of the text, and the bits a weight takes."""
    from parscale_mlx.graft import default_text, perplexity
    from parscale_mlx.load import load_model
    from parscale_mlx.tokenizer import load_tokenizer

    import mlx.core as mx
    from parscale_core.checkpoint.weight_files import find_safetensors, read_headers

    # The numbers are those of the quantised weights; a CPU computes many times faster without.
    model, config = load_model(folder, dequantize=mx.default_device() == mx.cpu)
    ids = load_tokenizer(folder, config).encode(default_text())[-windows * (WINDOW + 1) :]
    held_out = mx.array(ids).reshape(windows, WINDOW + 1)
    size = sum(entry.size for entry in read_headers(find_safetensors(folder)).values())
    return {"perplexity": perplexity(model, held_out), "megabytes": size / 1e6}


@click.command()
@click.argument("model")
@click.option("--bits", type=int, default=4, show_default=True)
@click.option("--recipes", default="none,mixed_4_6,dynamic,dwq", show_default=True)
@click.option("--windows", type=int, default=16, show_default=True, help="To learn from.")
@click.option("--held-out", type=int, default=16, show_default=True, help="Windows to measure.")
@click.option("--measure", "measured", type=click.Path(path_type=Path), hidden=True)
def main(model, bits, recipes, windows, held_out, measured):
    """Compare the ways to quantise MODEL, a folder."""
    if measured is not None:
        click.echo(json.dumps(measure(measured, held_out)))
        return
    click.echo("| weights | MB | perplexity |\n| --- | ---: | ---: |")
    with tempfile.TemporaryDirectory() as work:
        for recipe in ["full", *recipes.split(",")]:
            folder = Path(model)
            if recipe != "full":
                folder = Path(work) / recipe
                convert(model, folder, recipe, bits, windows)
            here = [sys.executable, __file__, model, "--held-out", str(held_out)]
            result = json.loads(subprocess.check_output([*here, "--measure", str(folder)]))
            name = {"none": f"{bits} bits"}.get(recipe, recipe)
            click.echo(f"| {name} | {result['megabytes']:.1f} | {result['perplexity']:.3f} |")


def convert(model: str, folder: Path, recipe: str, bits: int, windows: int) -> None:
    options = ["--q-recipe", recipe] if recipe != "none" else []
    if recipe in ("dynamic", "dwq"):
        options += ["--q-windows", str(windows)]
    if not recipe.startswith("mixed"):
        options += ["--q-bits", str(bits)]
    command = ["parscale", "convert", model, "--quantize", *options, "-o", str(folder)]
    run = [sys.executable, "-c", "from parscale_cli.main import cli; cli()", *command[1:]]
    subprocess.run(run, check=True, stdout=subprocess.DEVNULL)


if __name__ == "__main__":
    main()
