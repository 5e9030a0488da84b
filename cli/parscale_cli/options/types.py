"""Numbers and lists as people write them: 1.6B parameters, 1,2,4 streams."""

import math
import re
from pathlib import Path

import click
from parscale_core.analysis.numbers import UNITS

MOST = 2**31 - 1  # what every engine and file format can count
LARGEST, SMALLEST = 3.4028e38, 1.1755e-38  # numbers that float32 holds in full precision


class Whole(click.IntRange):
    """A whole number, by default at most 2^31 - 1."""

    name = "N"

    def __init__(self, min: int | None = None, max: int | None = MOST):
        super().__init__(min, max)

    def convert(self, value, param, ctx) -> int:
        number = click.INT.convert(value, param, ctx)
        # The description of the range leaves out limits that only stand for an integer's size.
        if self.max is not None and number > self.max:
            self.fail(f"{value} is more than {self.max}", param, ctx)
        if self.max == 2**64 - 1 and self.min is not None and number < self.min:
            self.fail(f"{value} is less than {self.min}", param, ctx)
        return super().convert(value, param, ctx)

    def _describe_range(self) -> str:
        if self.max == MOST:
            return f"x>={self.min}"
        return "" if self.max == 2**64 - 1 else super()._describe_range()


class Real(click.FloatRange):
    """A finite number that float32 can hold."""

    name = "X"

    def convert(self, value, param, ctx) -> float:
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value} is not a finite number", param, ctx)
        if abs(number) > LARGEST or 0 < abs(number) < SMALLEST:
            self.fail(f"{value} is beyond the numbers that float32 holds", param, ctx)
        return number

    def _describe_range(self) -> str:
        if self.min is None and self.max is None:
            return ""
        return super()._describe_range()


class OneOf(click.Choice):
    """One of several whole numbers."""

    def __init__(self, *numbers: int):
        super().__init__([str(number) for number in numbers])

    def convert(self, value, param, ctx) -> int:
        return int(super().convert(str(value), param, ctx))


class ParameterCount(click.ParamType):
    """A number of parameters: 1571472384, 1.6B, 135M."""

    name = "N"

    def convert(self, value, param, ctx) -> int:
        if isinstance(value, int):
            return value
        text = value.strip().upper()
        number, unit = (text[:-1], text[-1:]) if text[-1:].isalpha() else (text, "")
        try:
            count = float(number) * UNITS[unit]
        except (ValueError, KeyError):
            count = math.nan
        if not 1 <= count <= 1e18:
            self.fail(f"{value!r} is not a number of parameters such as 1.6B or 135M", param, ctx)
        return round(count)


class WholeNumbers(click.ParamType):
    """Whole numbers with commas between: 1,2,4,8; a tuple in rising order, each once."""

    def __init__(self, name: str = "N,N", most: int | None = None):
        self.name, self.most = name, most

    def convert(self, value, param, ctx) -> tuple[int, ...]:
        if isinstance(value, tuple):
            return value
        try:
            numbers = sorted({int(part) for part in value.split(",")})
        except ValueError:
            self.fail(f"{value!r} is not a list of whole numbers such as 1,2,4", param, ctx)
        most = self.most or MOST
        if not 1 <= numbers[0] <= numbers[-1] <= most:
            limit = f" from 1 to {self.most}" if self.most else ", each at least 1"
            self.fail(f"{value!r} is not a list of whole numbers{limit}", param, ctx)
        return tuple(numbers)


class Mode(click.ParamType):
    """A way of sharing a model: streams, tensor or SxT."""

    name = "mode"

    def convert(self, value, param, ctx) -> str:
        if value in ("streams", "tensor") or re.fullmatch(r"[1-9]\d{0,3}x[1-9]\d{0,3}", value):
            return value
        return self.fail(
            "streams, tensor or SxT (4x2: four shares of the streams, two of the layers)",
            param,
            ctx,
        )


class Modes(click.ParamType):
    """Modes with commas between: streams,tensor; a tuple, each once."""

    name = "modes"

    def convert(self, value, param, ctx) -> tuple[str, ...]:
        if isinstance(value, tuple):
            return value
        return tuple(dict.fromkeys(Mode().convert(mode, param, ctx) for mode in value.split(",")))


class Draft(click.ParamType):
    """What drafts: ngram, or a number of streams."""

    name = "draft"

    def convert(self, value, param, ctx) -> int | str:
        if value == "ngram" or isinstance(value, int):
            return value
        if value.isdecimal() and 1 <= int(value) <= 64:
            return int(value)
        return self.fail("ngram, or a number of streams", param, ctx)


class TextFile(click.Path):
    """A file; its text is the value."""

    def __init__(self):
        super().__init__(exists=True, dir_okay=False, path_type=Path)

    def convert(self, value, param, ctx) -> str:
        file = Path(str(super().convert(value, param, ctx)))
        try:
            return file.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise click.ClickException(f"{file}: not UTF-8 text") from error
