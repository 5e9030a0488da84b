"""pass@k: how often one of k completions of a problem is right."""

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import comb, sqrt
from statistics import mean, stdev

from parscale_cli.evaluation.problems import Problem
from parscale_cli.evaluation.sandbox import Limits, Outcome, run_program


@dataclass
class Sample:
    """One completion of a problem, and how its program ended."""

    problem: Problem
    completion: str
    outcome: Outcome


def run_samples(
    completions: Iterable[tuple[Problem, str]], limits: Limits, workers: int
) -> Iterator[Sample]:
    """Run completions, several at a time, in the order in which they come."""

    def run(pair: tuple[Problem, str]) -> Sample:
        problem, completion = pair
        return Sample(problem, completion, run_program(problem.program(completion), limits))

    with ThreadPoolExecutor(workers) as pool:
        yield from pool.map(run, completions)


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
