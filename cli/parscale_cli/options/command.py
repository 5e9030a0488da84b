"""Commands whose help has sections, and options whose defaults stand in a dataclass."""

from collections.abc import Callable
from dataclasses import MISSING, fields
from typing import Any

import click
from click.core import ParameterSource

from parscale_cli.errors import one_line_errors
from parscale_cli.interrupt import ends_in_time

REST = "Options"


class Option(click.Option):
    """An option in a section of its command's help, which takes no empty text.

    Args:
        section: its heading; by default that of the ``heading`` above it.
        of: the dataclass that has a field of this name, with the default.
        may_be_empty: take "" as a value.
    """

    def __init__(
        self, *args, section: str | None = None, of: type | None = None, may_be_empty=False, **kw
    ):
        self.section, self.may_be_empty = section, may_be_empty
        super().__init__(*args, **kw)
        if of is not None:
            self.default = default_of(of, self.name or "")
        told = isinstance(self.default, bool) or "[default" in (self.help or "")
        self.show_default = kw.get("show_default", not told)

    def type_cast_value(self, ctx: click.Context, value: Any) -> Any:
        _refuse_empty(self, ctx, value)
        return super().type_cast_value(ctx, value)


class Argument(click.Argument):
    """An argument that takes no empty text."""

    may_be_empty = False

    def type_cast_value(self, ctx: click.Context, value: Any) -> Any:
        _refuse_empty(self, ctx, value)
        return super().type_cast_value(ctx, value)


def _refuse_empty(parameter: Option | Argument, ctx: click.Context, value: Any) -> None:
    values = value if isinstance(value, list | tuple) else (value,)
    if "" in values and not parameter.may_be_empty:
        raise click.BadParameter("it is empty", ctx, parameter)


class Command(click.Command):
    """A command that fails in one line, ends soon on Ctrl-C, and whose help has sections."""

    def invoke(self, ctx: click.Context) -> Any:
        with ends_in_time(ctx.info_name), one_line_errors(self.params):
            return super().invoke(ctx)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        sections: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx) if isinstance(parameter, click.Option) else None
            if record is not None:
                section = getattr(parameter, "section", None) or REST
                sections.setdefault(section, []).append(record)
        rest = sections.pop(REST, [])
        for section, records in [*sections.items(), (REST, rest)]:
            with formatter.section(section):
                formatter.write_dl(records)

    def get_short_help_str(self, limit: int = 0) -> str:
        return summary(self)


class Group(click.Group):
    """A command of commands."""

    def get_short_help_str(self, limit: int = 0) -> str:
        return summary(self)


def summary(command: click.Command) -> str:
    """The first sentence of a command's help, whole."""
    return " ".join((command.help or "").split("\n\n")[0].split()).removesuffix(".")


def command(name: str | None = None, **settings: Any) -> Callable:
    """As ``click.command``."""
    return click.command(name, cls=Command, **settings)


def option(*names: str, **settings: Any) -> Callable:
    """As ``click.option``; see ``Option``."""
    return click.option(*names, cls=Option, **settings)


def heading(section: str) -> Callable:
    """Stands above options, and says in which section of the help they are."""

    def label(command: Any) -> Any:
        for parameter in command.__click_params__:
            if isinstance(parameter, Option) and parameter.section is None:
                parameter.section = section
        return command

    return label


def argument(name: str, **settings: Any) -> Callable:
    """As ``click.argument``; see ``Argument``."""
    return click.argument(name, cls=Argument, **settings)


def together(*options: Callable) -> Callable:
    """One decorator that adds all of these options."""

    def add(command: Callable) -> Callable:
        for one in reversed(options):
            command = one(command)
        return command

    return add


def default_of(kind: type, name: str) -> Any:
    """The default of a dataclass's field."""
    (field,) = (f for f in fields(kind) if f.name == name)
    return field.default_factory() if field.default_factory is not MISSING else field.default


def take(kind: type, options: dict[str, Any], **names: str) -> dict[str, Any]:
    """Take those of a command's options that are fields of a dataclass.

    Args:
        names: by field, the option's name where that is another.
    """
    wanted = {field.name: names.get(field.name, field.name) for field in fields(kind)}
    return {field: options.pop(name) for field, name in wanted.items() if name in options}


def given(ctx: click.Context) -> dict[str, str]:
    """By name, how the options are spelt that the user gave."""
    return {
        parameter.name: max(parameter.opts, key=len)
        if isinstance(parameter, click.Option)
        else parameter.name.upper()
        for parameter in ctx.command.params
        if parameter.name and ctx.get_parameter_source(parameter.name) != ParameterSource.DEFAULT
    }


def refuse(ctx: click.Context, why: str, *names: str) -> None:
    """Refuse options that would be ignored.

    Raises:
        click.UsageError: one of them was given; ``why`` says what it needs, or cannot go with.
    """
    found = given(ctx)
    for name in names:
        if name in found:
            raise click.UsageError(f"{found[name]} {why}")
