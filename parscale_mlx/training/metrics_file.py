"""A run's metrics: a line of JSON each, and mlx-lm's reporters, told the same."""

import json
import os
from pathlib import Path
from typing import Any

from mlx_lm.tuner.callbacks import TrainingCallback, get_reporting_callbacks

FILE = "metrics.jsonl"


class Metrics(TrainingCallback):
    """Writes every report of a run to its ``metrics.jsonl``, and passes it on.

    The fields are those that mlx-lm's trainer reports, and the gradients' norm.

    Args:
        run: the run's folder.
        step: the step the run goes on from; what the file holds of later ones is dropped.
        others: whom to tell besides.
    """

    def __init__(self, run: Path, step: int, others: list[TrainingCallback]):
        self.file, self.others = run / FILE, others
        kept = (
            [record for record in read_metrics(run) if record["iteration"] <= step] if step else []
        )
        new = self.file.with_suffix(".tmp")
        new.write_text("".join(json.dumps(record) + "\n" for record in kept), encoding="utf-8")
        new.replace(self.file)

    def on_train_loss_report(self, train_info: dict[str, Any]) -> None:
        self._write(train_info)
        for other in self.others:
            other.on_train_loss_report(train_info)

    def on_val_loss_report(self, val_info: dict[str, Any]) -> None:
        self._write(val_info)
        for other in self.others:
            other.on_val_loss_report(val_info)

    def _write(self, record: dict[str, Any]) -> None:
        with self.file.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(record) + "\n")
            stream.flush()
            os.fsync(stream.fileno())


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The records of a run's ``metrics.jsonl``; a last line that was cut short is left out.

    Raises:
        FileNotFoundError, ValueError: there are none, or the file holds something else.
    """
    file = run / FILE
    if not file.is_file():
        raise FileNotFoundError(f"{run}: no {FILE} in this folder; not a training run")
    lines = file.read_text(encoding="utf-8").splitlines()
    records = []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            record["iteration"]
        except (ValueError, TypeError, KeyError) as error:
            if number == len(lines):
                break
            raise ValueError(f"{file}, line {number}: not a report of a training run") from error
        records.append(record)
    return records


def make_reporters(
    report_to: str | None, project: str | None, run: Path, config: Any
) -> list[TrainingCallback]:
    """mlx-lm's reporters by name ("wandb,swanlab").

    Raises:
        ImportError, ValueError: one is not installed, or unknown.
    """
    reporter = get_reporting_callbacks(report_to, project or run.name, str(run), config)
    return [] if reporter is None else [reporter]
