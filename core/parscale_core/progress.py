"""Progress bars on standard error."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm import tqdm


def hidden(wanted: bool = True) -> bool | None:
    """tqdm's ``disable``: None shows a bar where standard error is a terminal that can draw one."""
    return None if wanted and os.environ.get("TERM") != "dumb" else True


def progress_bar(description: str, total: int, unit: str, progress: bool = True) -> tqdm:
    """A bar on standard error where that is a terminal, if it is wanted at all."""
    return tqdm(
        total=total,
        desc=description,
        unit=unit,
        unit_scale=unit == "B",
        disable=hidden(progress),
        leave=False,
    )


@contextmanager
def stages_bar() -> Iterator[Callable[[str, int, int], None]]:
    """A function that moves a bar on: what is done now, how much of it, and of how much."""
    with tqdm(disable=hidden(), leave=False) as bar:

        def report(what: str, done: int, total: int) -> None:
            bar.total = total
            bar.set_description(what, refresh=False)
            bar.update(done - bar.n)

        yield report
