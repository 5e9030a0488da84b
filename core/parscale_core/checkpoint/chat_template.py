"""Hold chat templates within bounds of time and size, wherever transformers renders one.

A template comes with a model, and Jinja's sandbox lets it take any memory: ``'a' * 10**10``.
"""

import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache, wraps
from itertools import islice
from math import inf
from typing import Any, cast

from jinja2 import Template, nodes
from jinja2.exceptions import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

from parscale_core.error_text import one_line

SIZE = 1 << 22  # characters and list entries in a value
SECONDS = 5
COUNT = 10**6  # the largest number that a method or filter takes, as for a width
WIDTH = re.compile(r"%[^a-zA-Z%]*(?:\*|\d{5})|\{[^}]*\d{5}")  # of a printf or str.format field

_deadline: ContextVar[float] = ContextVar("deadline", default=inf)


class TooMuch(TemplateError):
    """A template goes beyond its bounds."""


@lru_cache
def bound_templates() -> None:
    """From now on, transformers compiles chat templates with these bounds.

    Rendering one then raises ValueError, in one line, whatever goes wrong.
    """
    from transformers.utils import chat_template_utils

    # Not public; tests hold it to what it does here. Older versions cache the one function itself.
    cached = getattr(chat_template_utils, "_cached_compile_jinja_template", None)
    original = cached or chat_template_utils._compile_jinja_template.__wrapped__

    def compile_bounded(template: str) -> Template:
        environment = original("").environment
        environment.__class__ = _Bounded
        environment.set_up()
        with _bounds():
            return environment.from_string(template)

    chat_template_utils._compile_jinja_template = lru_cache(compile_bounded)


@contextmanager
def _bounds() -> Iterator[None]:
    token = _deadline.set(time.monotonic() + SECONDS)
    try:
        yield
    except RecursionError as error:
        raise ValueError("the chat template nests too deeply") from error
    except Exception as error:  # a template can raise anything that Python can
        raise ValueError(f"the chat template cannot be rendered: {one_line(error)}") from error
    finally:
        _deadline.reset(token)


class _BoundedTemplate(Template):
    def render(self, *args: Any, **kwargs: Any) -> str:
        with _bounds():
            return "".join(_pieces(self.root_render_func(self.new_context(dict(*args, **kwargs)))))


def _pieces(parts: Iterable[str]) -> Iterator[str]:
    size = 0
    for part in parts:
        size += len(part)
        if size > SIZE:
            raise TooMuch(f"it makes more than {SIZE} characters")
        _check()
        yield part


class _Bounded(ImmutableSandboxedEnvironment):
    """Jinja's sandbox, with every value that grows and every loop held within the bounds."""

    intercepted_binops = frozenset(["+", "*", "**", "%"])

    def set_up(self) -> None:
        """For an environment that was made as another class."""
        self.template_class, self.finalize = _BoundedTemplate, _checked
        self.filters = {name: _bounded_filter(own) for name, own in self.filters.items()}
        del self.globals["lipsum"]

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        return _Watch().visit(super()._parse(source, name, filename))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "*":
            _check_product(left, right)
        elif operator == "**" and abs(right) * max(1, abs(int(left)).bit_length()) > COUNT:
            raise TooMuch("a power is too large")
        elif operator == "%" and isinstance(left, str) and WIDTH.search(left):
            raise TooMuch("a field is too wide")
        return _checked(super().call_binop(context, operator, left, right))

    def call(self, context: Any, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        method = getattr(obj, "__wrapped__", obj)  # the sandbox wraps str.format
        own = getattr(method, "__self__", None)
        if isinstance(own, str | bytes):
            _check_arguments(args, kwargs)
            name = method.__name__
            if name == "replace" and len(args) > 1:
                _check_product(str(args[1]), own.count(args[0]))
            if name.startswith("format") and WIDTH.search(str(own)):
                raise TooMuch("a field is too wide")
        _check(*args, *kwargs.values())
        return _checked(super().call(context, obj, *args, **kwargs))


class _Watch(NodeTransformer):
    """Lead what the sandbox does not see, ``~`` and loops, through functions that look."""

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _call(_join, nodes.List(node.nodes, lineno=node.lineno))

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        node.iter = _call(_watched, node.iter)
        return node


def _call(function: Callable[..., Any], argument: nodes.Node) -> nodes.Call:
    target = nodes.ImportedName(f"{__name__}.{function.__name__}")
    return nodes.Call(target, [cast(nodes.Expr, argument)], [], None, None, lineno=argument.lineno)


def _join(values: list[Any]) -> str:
    _check(values)
    return "".join(map(str, values))


def _watched(values: Iterable[Any]) -> Iterator[Any]:
    for number, value in enumerate(values):
        if number % 64 == 0:
            _check()
        yield value


def _checked(value: Any) -> Any:
    _check(value)
    return value


def _check(*values: Any) -> None:
    left, steps, rest = SIZE, 0, [iter(values)]
    while rest:
        if steps % 65536 == 0 and time.monotonic() > _deadline.get():
            raise TooMuch(f"it takes more than {SECONDS} seconds")
        steps += 1
        value = next(rest[-1], rest)
        if value is rest:
            rest.pop()
            continue
        left -= len(value) if isinstance(value, str | bytes) else 1
        if isinstance(value, Mapping):
            rest += [iter(value.values()), iter(value)]
        elif isinstance(value, list | tuple | set | frozenset):
            rest.append(iter(value))
        if left < 0:
            raise TooMuch(f"a value has more than {SIZE} characters or entries")


def _check_product(left: Any, right: Any) -> None:
    for value, count in ((left, right), (right, left)):
        if isinstance(value, str | bytes | list | tuple) and isinstance(count, int):
            _check(value)
            size = max(len(value), sum(len(str(v)) for v in islice(value, 64)))
            if size * count > SIZE:
                raise TooMuch(f"a value has more than {SIZE} characters or entries")


def _check_arguments(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    for value in (*args, *kwargs.values()):
        if isinstance(value, int | float) and abs(value) > COUNT:
            raise TooMuch(f"{value:g} is more than {COUNT}")


def _bounded_filter(own: Callable[..., Any]) -> Callable[..., Any]:
    skipped = 2 if hasattr(own, "jinja_pass_arg") else 1  # and the value itself

    @wraps(own)
    def bounded(*args: Any, **kwargs: Any) -> Any:
        value = args[skipped - 1]
        _check(value, *args[skipped:], *kwargs.values())
        _check_arguments(args[skipped:], kwargs)
        if own.__name__ == "do_replace" and len(args) > skipped + 1:
            _check_product(str(args[skipped + 1]), str(value).count(str(args[skipped])))
        if own.__name__ == "do_format" and WIDTH.search(str(value)):
            raise TooMuch("a field is too wide")
        return _checked(own(*args, **kwargs))

    return bounded
