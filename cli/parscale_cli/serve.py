"""``parscale serve``: an OpenAI-compatible server and a page to chat on."""

import logging
from pathlib import Path

import click

from parscale_cli.adapters import adapter_options
from parscale_cli.parallel import parallel_option

KEY = "PARSCALE_API_KEY"


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
    "--log-level",
    type=click.Choice(["debug", "info", "warning", "error"]),
    default="info",
    show_default=True,
    help="info logs a line for each request, without its text.",
)  # fmt: skip
@parallel_option
def serve(
    model, adapters, streams, name, host, port, origins, log_level, temp, parallel, draft_model,
    **limits
):  # fmt: skip
    """Serve a model over HTTP as OpenAI's API, and a page to chat on at /.

    A request's model field picks the number of streams: NAME, or NAME:pP for P of them. With
    --parallel the first process listens, and there is one number of streams: that of --streams, or
    the most.
    """
    if limits["api_key"] == "":
        raise click.UsageError(f"the API key (--api-key or {KEY}) is empty")
    if name is not None and (not name or ":" in name):
        raise click.UsageError(f"--name {name!r}: a name without a colon, which precedes pP")
    if parallel is not None and draft_model is not None:
        raise click.UsageError("--draft-model cannot go with --parallel")
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", level=logging.WARNING)
    logging.getLogger("parscale").setLevel(log_level.upper())
    from parscale_mlx.load import find_adapters, load_draft, open_models
    from parscale_mlx.ranks import check_same
    from parscale_mlx.serve.models import ServedModels
    from parscale_mlx.serve.server import follow, open_server, serve_until_signalled
    from parscale_mlx.serve.settings import Settings

    from parscale_core.checkpoint.folder import find_folder
    from parscale_core.checkpoint.packaged import EMBEDDED

    folder = find_folder(model or EMBEDDED)
    settings = Settings(temperature=temp, allowed_origins=origins, **limits)
    only = () if parallel is None else (streams or max(find_adapters(folder, adapters)),)
    models, tokenizer = open_models(folder, adapters, only, parallel=parallel)
    name, draft = name or _name(model, folder), draft_model
    if draft_model is not None and draft_model not in {f"{name}:p{n}" for n in models}:
        draft = load_draft(draft_model, tokenizer)
    served = ServedModels(
        models, tokenizer, name=name, settings=settings, streams=streams, draft=draft
    )
    if served.parallel is not None:
        check_same(served.parallel.group, served.facts())
        if served.parallel.group.rank() > 0:
            follow(served)
            return
    with open_server(served, host, port) as server:
        click.echo(f"Serving {', '.join(served.names)} on {server.url}", err=True)
        serve_until_signalled(server)


def _name(model: str | None, folder: Path) -> str:
    return model if model and not Path(model).is_dir() else folder.resolve().name
