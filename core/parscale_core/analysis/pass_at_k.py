"""pass@k: how often one of k completions of a problem is right."""

from math import comb, sqrt
from statistics import mean, stdev

from parscale_core.evaluation.samples import Sample


def pass_at_k(samples: int, passed: int, k: int) -> float:
    """The chance that k of a problem's samples hold one that passed (arXiv 2107.03374, eq. 1)."""
    return 1 - comb(samples - passed, k) / comb(samples, k)


def estimate(samples: list[Sample], k: int) -> tuple[float, float | None]:
    """The mean of pass@k over problems, and its standard error, None for a single problem."""
    problems: dict[str, list[bool]] = {}
    for sample in samples:
        problems.setdefault(sample.problem.name, []).append(sample.outcome.passed)
    chances = [pass_at_k(len(passed), sum(passed), k) for passed in problems.values()]
    error = stdev(chances) / sqrt(len(chances)) if len(chances) > 1 else None
    return mean(chances), error
