"""Progress bars on standard error."""

import os

from tqdm import tqdm


def hidden(wanted: bool = True) -> bool | None:
    """tqdm's ``disable``: None shows a bar where standard error is a terminal that can draw one."""
    return None if wanted and os.environ.get("TERM") != "dumb" else True


def progress_bar(description: str, total: int, unit: str, progress: bool) -> tqdm:
    """A bar on standard error where that is a terminal, if it is wanted at all."""
    return tqdm(
        total=total,
        desc=description,
        unit=unit,
        unit_scale=unit == "B",
        disable=hidden(progress),
        leave=False,
    )
