"""``parscale serve``: OpenAI's API and Anthropic's over HTTP, and a page to chat on."""

import logging
import re
from dataclasses import replace
from pathlib import Path

import click
from parscale_core.engine.defaults import PROMPT_CACHE_BYTES, PROMPT_CACHE_SIZE
from parscale_core.serve.settings import Settings

from parscale_cli.engines import open_served
from parscale_cli.options.command import command, heading, option, take
from parscale_cli.options.common import (
    adapter_options,
    model_option,
    num_draft_tokens_option,
    quantised_cache_options,
    runtime_options,
)
from parscale_cli.options.parallel import parallel_option
from parscale_cli.options.types import Real, Whole

KEY = "PARSCALE_API_KEY"
LOG = logging.getLogger("parscale.serve")


def _setting(*names: str, **settings):
    return option(*names, section="Limits", of=Settings, **settings)


@command()
@model_option()
@adapter_options
@heading("Model")
@option(
    "--name",
    help="What clients call the model; NAME:pP is the one with P streams.  [default: the folder's]",
)
@heading("Connections")
@option("--host", default="127.0.0.1", help="Address to listen on.")
@option("--port", type=Whole(0, 65535), default=8080, help="Port to listen on; 0 for a free one.")
@option(
    "--api-key",
    envvar=KEY,
    metavar="KEY",
    may_be_empty=True,
    help=f"Demand this bearer token. Better set in {KEY}: others see a command line.",
)
@option(
    "--allow-origin",
    "allowed_origins",
    multiple=True,
    metavar="ORIGIN",
    help="Web pages that may call, as https://example.org or *; may be given several times.",
)
@_setting(
    "--max-concurrent",
    type=Whole(1, 1024),
    help="Requests in work at a time; what comes beyond gets status 429.",
)
@_setting("--max-request-bytes", type=Whole(1), help="Bytes in a request's body at most.")
@_setting(
    "--timeout",
    type=Real(0, min_open=True),
    metavar="SECONDS",
    help="From a request's arrival to the end of its answer.",
)
@_setting(
    "--read-timeout",
    type=Real(0, min_open=True),
    metavar="SECONDS",
    help="For a client to send its request, and to take what it is sent.",
)
@heading("Sampling")
@option(
    "-n",
    "--max-tokens",
    of=Settings,
    type=Whole(1),
    help="Tokens in an answer at most, and where a request does not say.",
)
@option(
    "--temp",
    "temperature",
    of=Settings,
    type=Real(0, 100),
    help="Sampling temperature where a request does not say.",
)
@quantised_cache_options
@heading("KV cache")
@option(
    "--prompt-cache-size",
    type=Whole(0),
    default=PROMPT_CACHE_SIZE,
    help="mlx: keep the KV caches of this many prompts for requests to come.",
)
@option(
    "--prompt-cache-bytes",
    type=Whole(0, 2**63 - 1),
    default=PROMPT_CACHE_BYTES,
    help="Bytes at most for those.",
)
@heading("Drafts")
@option(
    "--draft-model",
    metavar="DIR|NAME|NAME:pP",
    help="A model for speculative decoding, or one of those served. Answers then come one at a "
    "time, not in a batch.",
)
@option(
    "--draft",
    type=click.Choice(["ngram"]),
    help="Speculative decoding without a second model: drafts from the text so far.",
)
@num_draft_tokens_option
@heading("Output")
@option(
    "--log-level",
    type=click.Choice(["debug", "info", "warning", "error"]),
    default="info",
    help="info logs a line for each request, without its text.",
)
@runtime_options
@parallel_option
@click.pass_context
def serve(ctx, model, runtime, name, host, port, log_level, draft, prompt_cache_bytes, **options):
    """Serve a model over HTTP as OpenAI's API and Anthropic's, and a page to chat on at /.

    A request's model field picks the number of streams: NAME, or NAME:pP for P of them. With
    --parallel the first process listens, and there is one number of streams: that of --streams, or
    the most.
    """
    parallel, draft_model = options["parallel"], options["draft_model"]
    settings = Settings(**take(Settings, options))
    _check(settings.api_key, name, parallel, draft_model, draft)
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", level=logging.WARNING)
    logging.getLogger("parscale").setLevel(log_level.upper())
    from parscale_core.serve.server import Server, bind, is_loopback

    name = name or _name(model)
    shown = re.fullmatch(rf"{re.escape(name)}:p(\d+)", draft_model or "")
    if shown:
        options["draft_model"] = None
    drafts = int(shown[1]) if shown else draft or ("model" if draft_model else None)
    settings = replace(settings, draft=drafts)
    # Found before the model is read. Of ranks, the first listens.
    with bind(host, 0 if parallel and not _leads() else port) as bound:
        if settings.api_key is None and not is_loopback(bound):
            LOG.warning(
                "--host %s is open to other machines, and no API key is set (%s)", host, KEY
            )
        opened = open_served(
            ctx,
            model,
            runtime,
            options,
            size=settings.max_concurrent,
            kept_bytes=prompt_cache_bytes,
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
    if name is not None and ":" in name:
        raise click.UsageError(f"--name {name!r}: a name without a colon, which precedes pP")
    if parallel is not None and (draft_model or draft):
        given = "--draft-model" if draft_model else "--draft"
        raise click.UsageError(f"{given} cannot go with --parallel")
    if draft_model and draft:
        raise click.UsageError("--draft-model and --draft: one of them")


def _name(model: str | None) -> str:
    if model is None:
        from parscale_core.checkpoint.packaged import DEFAULT

        model = DEFAULT
    return Path(model).resolve().name if Path(model).is_dir() else model
