"""Numbers as people write them: 1.6B parameters, lists of streams."""

import math

import click
from parscale_core.analysis.numbers import UNITS


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
        most = self.most or 10**9
        if not 1 <= numbers[0] <= numbers[-1] <= most:
            limit = f" from 1 to {self.most}" if self.most else ", each at least 1"
            self.fail(f"{value!r} is not a list of whole numbers{limit}", param, ctx)
        return tuple(numbers)
