"""``parscale generate``: answers to prompts, printed as they come."""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import click
from parscale_core.checkpoint.output import check_file
from parscale_core.engine import Request

from parscale_cli import show
from parscale_cli.engines import NO_STREAMS, follows, open_engine
from parscale_cli.options.command import command, heading, option, refuse
from parscale_cli.options.common import (
    FILE,
    adapter_options,
    json_option,
    max_kv_size_option,
    model_option,
    num_draft_tokens_option,
    quantised_cache_options,
    runtime_options,
)
from parscale_cli.options.parallel import parallel_option
from parscale_cli.options.sampling import sampling_options, take_sampling
from parscale_cli.options.types import Draft
from parscale_cli.prompts import encode, read_prompts


@command()
@model_option()
@adapter_options
@heading("Prompts")
@option(
    "-p",
    "--prompt",
    "texts",
    multiple=True,
    metavar="TEXT",
    may_be_empty=True,
    help="The prompt; - reads standard input. Several make one batch.",
)
@option(
    "--prompts-file",
    type=FILE,
    help='JSON lines: a string, {"prompt": ...} or {"messages": [...]} each.',
)
@option("--system", metavar="TEXT", help="System prompt, for models with a chat template.")
@option(
    "--chat-template/--no-chat-template",
    "use_template",
    default=True,
    help="Put the prompt into the model's chat template (default), or take it as it is.",
)
@sampling_options
@heading("Sampling")
@option(
    "--json-schema", type=FILE, metavar="FILE", help="Answer with JSON that this schema allows."
)
@option(
    "--grammar",
    type=FILE,
    metavar="FILE",
    help="Answer with a text that this Lark grammar or regular expression allows.",
)
@heading("KV cache")
@option(
    "--prompt-cache",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Reuse what this .safetensors file holds of the prompt; written after the answer.",
)
@quantised_cache_options
@max_kv_size_option
@heading("Drafts")
@option("--draft-model", metavar="DIR|NAME", help="A small model for speculative decoding.")
@option(
    "--draft",
    type=Draft(),
    metavar="ngram|P",
    help="Speculative decoding without a second model: drafts from the text so far, or by the "
    "model with P streams.",
)
@num_draft_tokens_option
@heading("Output")
@option(
    "--show-streams", is_flag=True, help="Show the stream with the largest weight for each token."
)
@json_option
@option("--quiet", is_flag=True, help="No statistics, no progress and no hints on standard error.")
@option("--verbose", is_flag=True, help="Say what computes, and how.")
@runtime_options
@parallel_option
@click.pass_context
def generate(
    ctx, model, runtime, texts, prompts_file, system, use_template, show_streams, as_json, quiet,
    verbose, json_schema, grammar, stop, **options,
):  # fmt: skip
    """Generate text; statistics go to standard error."""
    sampling = take_sampling(ctx, options)
    prompts = read_prompts(texts, prompts_file)
    if len(prompts) > 1 and show_streams and not as_json:
        raise click.UsageError("--show-streams of several prompts needs --json")
    _check_together(ctx, options, len(prompts) > 1)
    form = _read_form(json_schema, grammar)
    cache_file: Path | None = options["prompt_cache"]
    with show.waiting("loading the model", shown=not quiet):
        opened = open_engine(ctx, model, runtime, options, hints=not quiet)
    with opened as engine:
        if verbose:
            click.echo("\n".join([engine.name, *getattr(engine, "notes", [])]), err=True)
        if show_streams and not engine.gives_stream_weights:
            raise ValueError(NO_STREAMS)
        requests = [
            Request(
                encode(engine.tokenizer, prompt, system=system, use_template=use_template),
                sampling=sampling,
                stop=stop,
                stream_weights=show_streams,
                grammar=form,
                draft=options["draft"] if options["draft_model"] is None else "model",
                num_draft_tokens=options["num_draft_tokens"],
            )
            for prompt in prompts
        ]
        if follows(engine, "prompt or sampling", [asdict(r) for r in requests]):
            return
        if cache_file is not None and cache_file.exists():
            engine.read_prompt_cache(cache_file)
        stats = show.Stats(prompt_tokens=sum(len(request.prompt) for request in requests))
        answers = [stats.watch(answer) for answer in [engine.submit(r) for r in requests]]
        answers[0] = show.after_the_first(answers[0], shown=not quiet)
        if as_json:
            found = [show.collect_json(*pair) for pair in zip(answers, prompts, strict=True)]
        elif show_streams:
            show.print_streams(answers[0], colour=show.in_colour())
        else:
            ids = [request.prompt for request in requests]
            show.print_text(answers, _beginnings(engine.tokenizer, prompts, ids))
        stats.peak_memory = show.peak_memory(engine)
        if cache_file is not None:
            engine.write_prompt_cache(cache_file)
    if as_json:
        for answer in found:
            click.echo(json.dumps(answer | {"stats": stats.as_dict()}, ensure_ascii=False))
    if not quiet:
        stats.print()


def _beginnings(tokenizer, prompts: Sequence[object], ids: list[Sequence[int]]) -> list[str]:
    """What a person reads before each answer: the prompt, where the answer goes on with it."""
    if not sys.stdout.isatty():
        return [""] * len(ids)
    read = (tokenizer.decode(list(tokens), skip_special_tokens=True) for tokens in ids)
    return [text if text == prompt else "" for prompt, text in zip(prompts, read, strict=True)]


def _read_form(json_schema: Path | None, grammar: Path | None) -> str | None:
    if json_schema is None and grammar is None:
        return None
    if json_schema is not None and grammar is not None:
        raise click.UsageError("--json-schema cannot go with --grammar")
    from parscale_core.engine.grammar import from_json_schema, from_text

    file = json_schema or grammar
    assert file is not None
    read = from_json_schema if json_schema is not None else from_text
    try:
        return read(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


def _check_together(ctx: click.Context, options: dict, many: bool) -> None:
    cache_file = options["prompt_cache"]
    if cache_file is not None:
        if many:
            raise click.UsageError("--prompt-cache takes a single prompt")
        if cache_file.suffix != ".safetensors":  # MLX goes by it
            raise click.UsageError(
                f"--prompt-cache {cache_file}: its name must end in .safetensors"
            )
        if not cache_file.parent.is_dir():
            raise click.UsageError(f"--prompt-cache {cache_file}: there is no such folder")
        check_file(cache_file, force=True)
    if options["draft"] is None and options["draft_model"] is None:
        refuse(ctx, "needs --draft or --draft-model", "num_draft_tokens")
    apart = (
        ("draft_model", "draft"),
        ("draft_model", "prompt_cache"),
        ("draft_model", "max_kv_size"),
        ("draft", "max_kv_size"),
        ("draft", "prompt_cache"),
        ("kv_bits", "max_kv_size"),
    )
    for one, other in apart:
        if options[one] is not None and options[other] is not None:
            one, other = (f"--{name.replace('_', '-')}" for name in (one, other))
            raise click.UsageError(f"{other} cannot go with {one}")
