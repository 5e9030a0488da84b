"""What a run shows on standard error while it goes on."""

import sys
import time
from typing import Any

from mlx_lm.tuner.callbacks import TrainingCallback
from parscale_core.progress import hidden
from tqdm import tqdm


class Progress(TrainingCallback):
    """A bar where standard error is a terminal that can draw one, else a line for each report.

    Args:
        step, steps: steps done before, and in the end.
        shown: False shows nothing at all.
    """

    def __init__(self, step: int, steps: int, *, shown: bool):
        self.shown, self.steps = shown, steps
        self.first, self.began = step, time.monotonic()
        self.valid = ""
        lines = hidden(shown) or not sys.stderr.isatty()
        self.bar = tqdm(total=steps, initial=step, desc="Training", unit="step", disable=lines)

    def advance(self) -> None:
        self.bar.update()

    def close(self) -> None:
        self.bar.close()

    def on_train_loss_report(self, train_info: dict[str, Any]) -> None:
        text = (
            f"loss {train_info['train_loss']:.4f}{self.valid}, "
            f"{train_info['tokens_per_second']:,.0f} tokens/s, "
            f"peak memory {train_info['peak_memory']:.2f} GB"
        )
        self.bar.set_postfix_str(text)
        if self.shown and self.bar.disable:
            step = train_info["iteration"]
            seconds = (time.monotonic() - self.began) / max(1, step - self.first)
            left = tqdm.format_interval(seconds * (self.steps - step))
            print(f"step {step} of {self.steps}: {text}, {left} left", file=sys.stderr, flush=True)

    def on_val_loss_report(self, val_info: dict[str, Any]) -> None:
        self.valid = f", held out {val_info['val_loss']:.4f}"
        if self.shown and self.bar.disable:
            print(f"step {val_info['iteration']} of {self.steps}{self.valid}", file=sys.stderr)
