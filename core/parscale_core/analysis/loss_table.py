"""Tables of (parameters, streams, loss) in CSV."""

import csv
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

PAPER_LOSSES = Path(__file__).with_name("losses.csv")
COLUMNS = ("parameters", "streams", "loss")


@dataclass(frozen=True)
class Losses:
    """What was measured on one dataset: arrays of equal length."""

    dataset: str
    parameters: np.ndarray
    streams: np.ndarray
    loss: np.ndarray

    def covers(self, parameters: float, streams: float) -> bool:
        """Whether both numbers lie between the smallest and the largest of the table."""
        return all(
            a.min() <= value <= a.max()
            for a, value in ((self.parameters, parameters), (self.streams, streams))
        )


def read_losses(file: Path) -> list[Losses]:
    """Read the columns parameters, streams and loss, and a column dataset that groups the rows.

    Lines that begin with # are comments; other columns are ignored.

    Raises:
        ValueError: a column is missing or a value is not a positive number; the message names the
            file and the line.
    """
    rows: dict[str, list[list[float]]] = {}
    try:
        with file.open(encoding="utf-8-sig", newline="") as lines:
            numbered = [
                (n, line)
                for n, line in enumerate(lines, start=1)
                if line.strip() and not line.startswith("#")
            ]
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: not a text file in UTF-8") from error
    if not numbered:
        raise ValueError(f"{file}: empty, where a line with {','.join(COLUMNS)} is needed")
    reader = csv.DictReader((line for _, line in numbered), strict=True)
    missing = [name for name in COLUMNS if name not in (reader.fieldnames or [])]
    if missing:
        raise ValueError(f"{file}, line {numbered[0][0]}: no column {', '.join(missing)}")
    try:
        for row in reader:
            where = f"{file}, line {numbered[reader.reader.line_num - 1][0]}"
            values = [_positive(row[name], f"{where}: {name}") for name in COLUMNS]
            rows.setdefault(row.get("dataset") or "all", []).append(values)
    except csv.Error as error:
        where = f"{file}, line {numbered[reader.reader.line_num - 1][0]}"
        raise ValueError(f"{where}: not CSV: {error}") from error
    if not rows:
        raise ValueError(f"{file}: a head line and no data")
    return [
        Losses(dataset, *np.array(values, dtype=np.float64).T) for dataset, values in rows.items()
    ]


def _positive(text: str | None, where: str) -> float:
    try:
        value = float(text or "")
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{where} is {text or 'missing'}, where a positive number is needed")
    if where.endswith("streams") and value < 1:
        raise ValueError(f"{where} is {text}, where at least 1 is needed")
    return value
