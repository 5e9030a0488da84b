"""Progress bars on standard error."""

from tqdm import tqdm


def progress_bar(description: str, total: int, unit: str, progress: bool) -> tqdm:
    """A bar on standard error where that is a terminal, if it is wanted at all."""
    # None: where standard error is a terminal.
    return tqdm(
        total=total,
        desc=description,
        unit=unit,
        unit_scale=unit == "B",
        disable=None if progress else True,
        leave=False,
    )
