"""What the recipe trains: plain numbers to change."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Plan:
    """What all runs share: data and its order, steps, and rates.

    Attributes:
        eval_tokens: held-out tokens that the runs are compared on.
    """

    steps: int = 400
    batch_size: int = 1
    seq_length: int = 256
    streams_lr: float = 1e-2
    aggregator_lr: float = 1e-3
    eval_tokens: int = 25_000

    @property
    def tokens(self) -> int:
        """What each run learns from."""
        return self.steps * self.batch_size * self.seq_length


@dataclass(frozen=True)
class Run:
    """One adapter: P streams with a prefix each, or one stream with a prefix as a control."""

    streams: int
    prefix_length: int
    seed: int = 0

    @property
    def name(self) -> str:
        kind = f"p{self.streams}" if self.streams > 1 else f"prefix{self.prefix_length}"
        return f"{kind}-seed{self.seed}"


PLAN = Plan()
RUNS = (
    Run(2, 48),
    Run(4, 48),
    Run(1, 48),
    Run(1, 96),
    Run(1, 192),
    Run(2, 48, seed=1),
    Run(1, 48, seed=1),
    Run(2, 48, seed=2),
    Run(1, 48, seed=2),
)
