"""Perplexities of models on the same text."""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from parscale_core.analysis.intervals import Interval, bootstrap_means, percentiles
from parscale_core.evaluation.text import Window

FEW_DOCUMENTS = 20


@dataclass
class Score:
    """One model's.

    Attributes:
        interval: of the perplexity; None where there is a single text to resample.
        times: the perplexity over that of the first model, and its interval.
    """

    streams: int
    perplexity: float
    interval: Interval | None
    bits_per_byte: float
    times: float | None = None
    times_interval: Interval | None = None


@dataclass
class Report:
    """What was read, and each model's score.

    Attributes:
        resampled: what the intervals resample, "documents" or "windows".
    """

    documents: int
    windows: int
    tokens: int
    bytes: int
    level: float
    resampled: str
    scores: list[Score]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def report(
    losses: dict[int, list[float]], windows: list[Window], n_bytes: int, level: float
) -> Report:
    """Perplexities, and how sure they are.

    Args:
        losses: by number of streams, each window's losses summed over its scored tokens, in nats.
        n_bytes: of the scored text in UTF-8.
        level: of the intervals, as 0.95.
    """
    documents = len({window.document for window in windows})
    by_document = documents >= FEW_DOCUMENTS
    group = [window.document if by_document else n for n, window in enumerate(windows)]
    _, index = np.unique(group, return_inverse=True)
    counts = np.bincount(index, [window.scored for window in windows])
    sums = np.stack([np.bincount(index, own) for own in losses.values()])
    tokens = counts.sum()
    means = sums.sum(axis=1) / tokens
    resampled = bootstrap_means(sums, counts) if len(counts) > 1 else None
    scores = []
    for n, streams in enumerate(losses):
        score = Score(
            streams,
            float(np.exp(means[n])),
            None if resampled is None else percentiles(np.exp(resampled[n]), level),
            float(sums[n].sum() / np.log(2) / n_bytes),
        )
        if n:
            score.times = float(np.exp(means[n] - means[0]))
            if resampled is not None:
                ratio = np.exp(resampled[n] - resampled[0])
                score.times_interval = percentiles(ratio, level)
        scores.append(score)
    kind = "documents" if by_document else "windows"
    return Report(documents, len(windows), int(tokens), n_bytes, level, kind, scores)
