"""How every command says that numbers are not finite."""


def not_finite(what: str) -> str:
    """One line for weights, logits or losses that hold NaN or infinity."""
    return (
        f"{what} NaN or infinity: the weights are damaged, or numbers have left the range of "
        "float16, which ends at 65504 (bfloat16 and float32 go further)"
    )
