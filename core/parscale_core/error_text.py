"""What several errors say in the same words."""


def one_line(error: object, most: int | None = 300) -> str:
    """An error's own words in one line of at most ``most`` characters; its class, if it has none.

    For messages that quote what a library said, over several lines or with all of its input.
    """
    return " ".join(str(error).split())[:most] or type(error).__name__


def not_finite(what: str) -> str:
    """One line for weights, logits or losses that hold NaN or infinity."""
    return (
        f"{what} NaN or infinity: the weights are damaged, or numbers have left the range of "
        "float16, which ends at 65504 (bfloat16 and float32 go further)"
    )
