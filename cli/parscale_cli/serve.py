"""``parscale serve``: OpenAI's API and Anthropic's over HTTP, and a page to chat on."""

import logging
import re
from contextlib import nullcontext
from pathlib import Path

import click

from parscale_cli.adapters import adapter_options
from parscale_cli.parallel import parallel_option

KEY = "PARSCALE_API_KEY"
LOG = logging.getLogger("parscale.serve")


@click.command()
@click.option(
    "--model",
    metavar="DIR|NAME",
    help="A model folder or a name on the hub; without it, the small one of this package.",
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
    help="Keep the KV caches of this many prompts for requests to come.",
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
@parallel_option
def serve(
    model, adapters, streams, name, host, port, origins, log_level, temp, parallel, draft_model,
    draft, prompt_cache_size, prompt_cache_bytes, kv_bits, kv_group_size,
    quantized_kv_start, **limits
):  # fmt: skip
    """Serve a model over HTTP as OpenAI's API and Anthropic's, and a page to chat on at /.

    A request's model field picks the number of streams: NAME, or NAME:pP for P of them. With
    --parallel the first process listens, and there is one number of streams: that of --streams, or
    the most.
    """
    _check(limits["api_key"], name, parallel, draft_model, draft)
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", level=logging.WARNING)
    logging.getLogger("parscale").setLevel(log_level.upper())
    from parscale_mlx.engine import CacheOptions, open_engine
    from parscale_mlx.ranks import check_same, join

    from parscale_core.serve.server import Server, bind, is_loopback
    from parscale_core.serve.settings import Settings

    group = None if parallel is None else join()
    name = name or _name(model)
    shown = re.fullmatch(rf"{re.escape(name)}:p(\d+)", draft_model or "")
    settings = Settings(
        temperature=temp,
        allowed_origins=origins,
        draft=int(shown[1]) if shown else draft or ("model" if draft_model else None),
        **limits,
    )
    follows = group is not None and group.rank() > 0
    with nullcontext() if follows else bind(host, port) as bound:
        if bound is not None and limits["api_key"] is None and not is_loopback(bound):
            LOG.warning(
                "--host %s is open to other machines, and no API key is set (%s)", host, KEY
            )
        engine = open_engine(
            model,
            adapters=adapters,
            streams="all" if parallel is None else (),
            default=streams,
            parallel=parallel,
            draft_model=None if shown else draft_model,
            batch_size=limits["max_concurrent"],
            prompt_cache_size=prompt_cache_size,
            prompt_cache_bytes=prompt_cache_bytes,
            cache=CacheOptions(kv_bits and int(kv_bits), int(kv_group_size), quantized_kv_start),
        )
        if group is not None:
            check_same(group, {"name of the model": name})
        if follows:
            engine.follow()
            return
        try:
            assert bound is not None
            server = Server(engine, bound, name, settings)
            click.echo(f"Serving {', '.join(server.serving.names.all)} on {server.url}", err=True)
            server.run()
        finally:
            engine.close()


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
        from parscale_core.checkpoint.packaged import EMBEDDED

        model = str(EMBEDDED)
    return Path(model).resolve().name if Path(model).is_dir() else model
