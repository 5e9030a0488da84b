"""``parscale generate``: text from a prompt, or from many as one batch."""

import json
import sys
from pathlib import Path

import click

from parscale_cli import show
from parscale_cli.adapters import adapter_options
from parscale_cli.parallel import parallel_option
from parscale_cli.prompts import encode, read_prompts
from parscale_cli.runtime import open_runtime, runtime_options
from parscale_cli.sampling import sampling_options, take_sampling


@click.command()
@click.option(
    "--model",
    metavar="DIR|NAME",
    help="A model folder or a name on the hub; without it, the small one of this package.",
)
@adapter_options
@click.option(
    "-p",
    "--prompt",
    "texts",
    multiple=True,
    metavar="TEXT",
    help="The prompt; - reads standard input. Several make one batch.",
)
@click.option(
    "--prompts-file",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help='JSON lines: a string, {"prompt": ...} or {"messages": [...]} each.',
)
@click.option("--system", metavar="TEXT", help="System prompt, for models with a chat template.")
@click.option(
    "--chat-template/--no-chat-template",
    "use_template",
    default=True,
    help="Put the prompt into the model's chat template (default), or take it as it is.",
)
@sampling_options
@click.option(
    "--prompt-cache",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Reuse what this .safetensors file holds of the prompt; written after the answer.",
)
@click.option(
    "--kv-bits",
    type=click.Choice(["2", "3", "4", "5", "6", "8"]),
    help="Quantise the KV cache to this many bits.",
)
@click.option(
    "--kv-group-size",
    type=click.Choice(["32", "64", "128"]),
    default="64",
    show_default=True,
    help="Group size of the quantised KV cache.",
)
@click.option(
    "--quantized-kv-start",
    type=click.IntRange(0),
    default=5000,
    show_default=True,
    help="Quantise the KV cache once it holds this many tokens.",
)
@click.option(
    "--max-kv-size",
    type=click.IntRange(5),
    help="Keep about this many tokens in a rotating KV cache, besides the prefix.",
)
@click.option("--draft-model", metavar="DIR|NAME", help="A small model for speculative decoding.")
@click.option(
    "--num-draft-tokens",
    type=click.IntRange(1),
    default=3,
    show_default=True,
    help="Tokens to draft at a time.",
)
@click.option(
    "--show-streams", is_flag=True, help="Show which stream spoke loudest for each token."
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object a prompt.")
@click.option("--quiet", is_flag=True, help="No statistics on standard error.")
@runtime_options
@parallel_option
@click.pass_context
def generate(
    ctx, model, runtime, texts, prompts_file, system, use_template, show_streams, as_json, quiet,
    **options,
):  # fmt: skip
    """Generate text; statistics go to standard error."""
    sampling = take_sampling(options)
    prompts = read_prompts(texts, prompts_file)
    many = len(prompts) > 1
    if many and show_streams and not as_json:
        raise click.UsageError("--show-streams of several prompts needs --json")
    _check_together(options, many)
    runtime = open_runtime(ctx, model, runtime, options)
    if show_streams:
        runtime.require_streams()
    ids = [
        encode(runtime.tokenizer, prompt, system=system, use_template=use_template)
        for prompt in prompts
    ]
    stats = show.Stats(prompt_tokens=sum(map(len, ids)))
    pieces = stats.watch(runtime.answer(ids, sampling, with_streams=show_streams))
    if show_streams:
        pieces = runtime.add_streams(ids, pieces)
    decode = runtime.tokenizer.decode
    if as_json:
        answers = show.collect_json(pieces, prompts, decode)
    elif show_streams:
        show.print_streams(pieces, decode, colour=sys.stdout.isatty())
    else:
        show.print_text(pieces, many=len(prompts))
    stats.peak_memory = runtime.peak_memory()
    if as_json:
        for answer in answers:
            click.echo(json.dumps(answer | {"stats": stats.as_dict()}, ensure_ascii=False))
    if not quiet:
        stats.print()


def _check_together(options: dict, many: bool) -> None:
    single_only = ("prompt_cache", "kv_bits", "max_kv_size", "draft_model")
    for name in single_only:
        if many and options[name] is not None:
            raise click.UsageError(f"--{name.replace('_', '-')} takes a single prompt")
    cache_file = options["prompt_cache"]
    if cache_file is not None and cache_file.suffix != ".safetensors":  # MLX goes by it
        raise click.UsageError(f"--prompt-cache {cache_file}: its name must end in .safetensors")
    if options["draft_model"] is not None:
        for name in ("prompt_cache", "max_kv_size"):
            if options[name] is not None:
                raise click.UsageError(f"--{name.replace('_', '-')} cannot go with --draft-model")
