"""What a conversion is told; the choices and the defaults stand here."""

from dataclasses import dataclass

DTYPES = ("float32", "float16", "bfloat16")
LAYOUTS = {"mlx": "mlx", "hf": "pt"}  # name: what a safetensors file says of its format
MODES = {  # mode: its default group size and bits
    "affine": (64, 4),
    "mxfp4": (32, 4),
    "nvfp4": (16, 4),
    "mxfp8": (32, 8),
}
MIXED = ("mixed_2_6", "mixed_3_4", "mixed_3_6", "mixed_4_6")  # mlx-lm's
LEARNT = ("dwq", "dynamic")
RECIPES = (*MIXED, *LEARNT)


@dataclass(frozen=True)
class Quantization:
    """How to quantise in MLX.

    Attributes:
        bits, group_size, mode: as ``mlx.core.quantize``; by default what suits the mode.
        recipe: None for all weights alike; one of mlx-lm's mixed recipes (more bits for the first
            and last layers' v_proj and down_proj), which choose the bits themselves; "dynamic":
            more bits for the half of the weights that a gradient shows to be sensitive; "dwq":
            scales and biases learnt from the full model's logits.
        everything: quantise the aggregator too.
        windows: how many windows of text to learn from.
        text: what to learn from; by default English that comes with Python.
    """

    bits: int | None = None
    group_size: int | None = None
    mode: str = "affine"
    recipe: str | None = None
    everything: bool = False
    windows: int = 64
    text: str | None = None

    @property
    def learns(self) -> bool:
        """Whether the recipe computes with the full model and a text."""
        return self.recipe in LEARNT


@dataclass(frozen=True)
class ConvertSettings:
    """What a checkpoint becomes.

    Attributes:
        to: "mlx", or "hf" for what the published PyTorch classes load; never quantised.
        with_model_file: add the model's code as mlx-lm's own commands want it for more than one
            stream (``--trust-remote-code``).
        dtype: float32, float16 or bfloat16, for what is not quantised; by default the stored type.
        quantization: how to quantise all but the prefixes and the aggregator; None for not at all.
        streams: graft this many streams onto a plain model.
        prefix_length: the length of the grafted prefixes.
        text: what the grafted prefixes are made from; by default English that comes with Python.
    """

    to: str = "mlx"
    with_model_file: bool = False
    dtype: str | None = None
    quantization: Quantization | None = None
    streams: int | None = None
    prefix_length: int = 48
    text: str | None = None
