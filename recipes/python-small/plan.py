"""What the recipe trains, and with how many tokens: plain numbers to change."""

from dataclasses import dataclass, replace

STREAMS = (2, 4, 8)


@dataclass
class Plan:
    """Sizes of the model and of the runs.

    Attributes:
        pretrain_tokens: stage 1, at one stream.
        stream_tokens: stage 2, for every number of streams, frozen or not.
        corpus_bytes: of source, at most about so many.
        eval_tokens: held-out tokens that the runs are compared on.
        jobs: runs side by side, each on one core; stage 1 is one run in as many processes.
    """

    hidden_size: int = 256
    layers: int = 6
    heads: int = 4
    kv_heads: int = 2
    intermediate_size: int = 704
    vocabulary: int = 4096
    seq_length: int = 256
    batch_size: int = 16
    prefix_tokens: int = 48
    init: str = "random"
    pretrain_tokens: int = 20_000_000
    pretrain_lr: float = 2e-3
    stream_tokens: int = 400_000
    streams_lr: float = 3e-2
    train_all_lr: float = 3e-4
    streams: tuple[int, ...] = STREAMS
    seeds: tuple[int, ...] = (0, 1, 2)
    eval_tokens: int = 60_000
    corpus_bytes: int = 10**9
    jobs: int = 2

    @property
    def step_tokens(self) -> int:
        return self.batch_size * self.seq_length


QUICK = replace(
    Plan(),
    hidden_size=64,
    layers=2,
    intermediate_size=176,
    vocabulary=512,
    seq_length=64,
    batch_size=8,
    prefix_tokens=8,
    pretrain_tokens=60_000,
    stream_tokens=10_000,
    streams=(2, 4),
    seeds=(0, 1),
    eval_tokens=4_000,
    corpus_bytes=600_000,
)
