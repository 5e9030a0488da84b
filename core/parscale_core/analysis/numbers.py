"""Numbers as people write them: 1.57B."""

UNITS = {"": 1, "K": 1e3, "M": 1e6, "B": 1e9, "G": 1e9, "T": 1e12}


def count(number: float) -> str:
    """A number of parameters in three digits: 1.57B."""
    for unit in ("T", "B", "M", "K"):
        if number >= UNITS[unit]:
            return f"{number / UNITS[unit]:.3g}{unit}"
    return f"{number:.3g}"
