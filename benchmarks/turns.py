"""Sides of a comparison: each is a process of its own, and all take turns.

The threads of one library disturb another's, where one's weights lie in memory depends on what was
loaded before, and what else the machine does then touches all sides.
"""

import multiprocessing
import time
from collections.abc import Callable
from typing import Any

REST = 0.2  # seconds before each turn: threads of the last side's pool still spin for a while

# A side's process calls the first to load what it measures, and the second in every turn.
Run = Callable[[Any], Any]
Side = Callable[[], Run]


def take_turns(
    sides: dict[str, Side], argument: Any, *, repeats: int, restarts: int = 1
) -> dict[str, list[Any]]:
    """What each side's run returns for ``argument``, in each of ``repeats`` turns.

    The first turn after a start warms up and is left out. All sides start ``restarts`` times, since
    the same program runs up to a tenth faster or slower from one start to the next.
    """
    results: dict[str, list[Any]] = {name: [] for name in sides}
    for first in range(restarts):
        # There and back, since it is not the same whom a side comes after.
        names = [list(sides), list(reversed(sides))]
        processes = {name: _start(sides[name]) for name in names[first % 2]}
        for turn in range(repeats + 1):
            for name in names[turn % 2]:
                time.sleep(REST)
                processes[name].send((argument,))
                result = processes[name].recv()
                if turn > 0:
                    results[name].append(result)
        for process in processes.values():
            process.send(None)
    return results


def _start(side: Side):
    """A side's process, once it has loaded: where to send it turns."""
    context = multiprocessing.get_context("spawn")
    connection, theirs = context.Pipe()
    context.Process(target=_serve, args=(side, theirs), daemon=True).start()
    theirs.close()
    connection.recv()
    return connection


def _serve(side: Side, connection) -> None:
    run = side()
    connection.send(None)
    while turn := connection.recv():
        connection.send(run(*turn))
