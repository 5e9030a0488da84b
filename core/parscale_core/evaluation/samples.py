"""Completions of programming problems, run side by side."""

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from parscale_core.evaluation.problems import Problem
from parscale_core.evaluation.sandbox import Limits, Outcome, run_program


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
