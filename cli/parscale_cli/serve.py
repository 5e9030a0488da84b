"""``parscale serve``: OpenAI's API and Anthropic's over HTTP, and a page to chat on."""

import logging
import re
from math import isfinite
from pathlib import Path

import click

from parscale_cli.adapters import adapter_options
from parscale_cli.parallel import parallel_option
from parscale_cli.runtime import open_served, runtime_options

KEY = "PARSCALE_API_KEY"
LOG = logging.getLogger("parscale.serve")


@click.command()
@click.option(
    "--model",
    metavar="DIR|NAME",
    help="A model folder or a name on the hub; without it, SmolLM2 with streams.",
)
@adapter_options
@click.option(
    "--name",
    help="What clients call the model; NAME:pP is the one with P streams.  [default: the folder's]",
)
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=8080,
    show_default=True,
    help="Port to listen on; 0 for a free one.",
)
@click.option(
    "--max-concurrent",
    type=click.IntRange(1, 1024),
    default=32,
    show_default=True,
    help="Requests in work at a time; what comes beyond gets status 429.",
)
@click.option(
    "-n",
    "--max-tokens",
    type=click.IntRange(1),
    default=2048,
    show_default=True,
    help="Tokens in an answer at most, and where a request does not say.",
)
@click.option(
    "--temp",
    type=click.FloatRange(0, 100),
    default=0.0,
    show_default=True,
    help="Sampling temperature where a request does not say.",
)
@click.option(
    "--max-request-bytes",
    type=click.IntRange(1),
    default=1 << 20,
    show_default=True,
    help="Bytes in a request's body at most.",
)
@click.option(
    "--timeout",
    type=click.FloatRange(0, min_open=True),
    default=600.0,
    show_default=True,
    metavar="SECONDS",
    help="From a request's arrival to the end of its answer.",
)
@click.option(
    "--read-timeout",
    type=click.FloatRange(0, min_open=True),
    default=30.0,
    show_default=True,
    metavar="SECONDS",
    help="For a client to send its request, and to take what it is sent.",
)
@click.option(
    "--api-key",
    envvar=KEY,
    metavar="KEY",
    help=f"Demand this bearer token. Better set in {KEY}: others see a command line.",
)
@click.option(
    "--allow-origin",
    "origins",
    multiple=True,
    metavar="ORIGIN",
    help="Web pages that may call, as https://example.org or *; may be given several times.",
)
@click.option(
    "--draft-model",
    metavar="DIR|NAME|NAME:pP",
    help="A model for speculative decoding, or one of those served. Answers then come one at a "
    "time, not in a batch.",
)
@click.option(
    "--draft",
    type=click.Choice(["ngram"]),
    help="Speculative decoding without a second model: drafts from the text so far.",
)
@click.option(
    "--num-draft-tokens",
    type=click.IntRange(1, 64),
    default=3,
    show_default=True,
    help="Tokens to draft at a time, where a request does not say.",
)
@click.option(
    "--prompt-cache-size",
    type=click.IntRange(0),
    default=10,
    show_default=True,
    help="mlx: keep the KV caches of this many prompts for requests to come.",
)
@click.option(
    "--prompt-cache-bytes",
    type=click.IntRange(0),
    default=4 << 30,
    show_default=True,
    help="Bytes at most for those.",
)
@click.option(
    "--kv-bits",
    type=click.Choice(["2", "3", "4", "6", "8"]),
    help="Quantise KV caches to so many bits. Answers then come one at a time, not in a batch.",
)
@click.option(
    "--kv-group-size",
    type=click.Choice(["32", "64", "128"]),
    default="64",
    show_default=True,
    help="Numbers that are quantised together.",
)
@click.option(
    "--quantized-kv-start",
    type=click.IntRange(0),
    default=5000,
    show_default=True,
    help="Quantise a KV cache once it holds this many tokens.",
)
@click.option(
    "--log-level",
    type=click.Choice(["debug", "info", "warning", "error"]),
    default="info",
    show_default=True,
    help="info logs a line for each request, without its text.",
)  # fmt: skip
@runtime_options
@parallel_option
@click.pass_context
def serve(
    ctx, model, runtime, name, host, port, origins, log_level, temp, max_concurrent, max_tokens,
    max_request_bytes, timeout, read_timeout, api_key, draft, num_draft_tokens, prompt_cache_bytes,
    **options
):  # fmt: skip
    """Serve a model over HTTP as OpenAI's API and Anthropic's, and a page to chat on at /.

    A request's model field picks the number of streams: NAME, or NAME:pP for P of them. With
    --parallel the first process listens, and there is one number of streams: that of --streams, or
    the most.
    """
    parallel, draft_model = options["parallel"], options["draft_model"]
    for option, value in (("temp", temp), ("timeout", timeout), ("read-timeout", read_timeout)):
        if not isfinite(value):
            raise click.UsageError(f"--{option} {value}: must be a finite number")
    _check(api_key, name, parallel, draft_model, draft)
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", level=logging.WARNING)
    logging.getLogger("parscale").setLevel(log_level.upper())
    from parscale_core.serve.server import Server, bind, is_loopback
    from parscale_core.serve.settings import Settings

    name = name or _name(model)
    shown = re.fullmatch(rf"{re.escape(name)}:p(\d+)", draft_model or "")
    if shown:
        options["draft_model"] = None
    settings = Settings(
        max_concurrent=max_concurrent,
        max_tokens=max_tokens,
        max_request_bytes=max_request_bytes,
        timeout=timeout,
        read_timeout=read_timeout,
        temperature=temp,
        api_key=api_key,
        allowed_origins=origins,
        draft=int(shown[1]) if shown else draft or ("model" if draft_model else None),
        num_draft_tokens=num_draft_tokens,
    )
    # Found before the model is read. Of ranks, the first listens.
    with bind(host, 0 if parallel and not _leads() else port) as bound:
        if api_key is None and not is_loopback(bound):
            LOG.warning(
                "--host %s is open to other machines, and no API key is set (%s)", host, KEY
            )
        opened = open_served(
            ctx, model, runtime, options, size=max_concurrent, kept_bytes=prompt_cache_bytes
        )
        with opened as engine:
            if parallel is not None and _follows(engine, name):
                return
            server = Server(engine, bound, name, settings)
            click.echo(f"Serving {', '.join(server.serving.names.all)} on {server.url}", err=True)
            server.run()


def _leads() -> bool:
    from parscale_mlx.parallel.ranks import join

    return join().rank() == 0


def _follows(engine, name: str) -> bool:
    from parscale_mlx.parallel.ranks import check_same

    check_same(engine.parallel.group, {"name of the model": name})
    if engine.follows:
        engine.follow()
    return engine.follows


def _check(key, name, parallel, draft_model, draft) -> None:
    if key == "":
        raise click.UsageError(f"the API key (--api-key or {KEY}) is empty")
    if key is not None and not key.isascii():
        raise click.UsageError(
            f"the API key (--api-key or {KEY}) may only have ASCII characters: HTTP sends no others"
        )
    if name is not None and (not name or ":" in name):
        raise click.UsageError(f"--name {name!r}: a name without a colon, which precedes pP")
    if parallel is not None and (draft_model or draft):
        option = "--draft-model" if draft_model else "--draft"
        raise click.UsageError(f"{option} cannot go with --parallel")
    if draft_model and draft:
        raise click.UsageError("--draft-model and --draft: one of them")


def _name(model: str | None) -> str:
    if model is None:
        from parscale_core.checkpoint.packaged import DEFAULT

        model = DEFAULT
    return Path(model).resolve().name if Path(model).is_dir() else model
