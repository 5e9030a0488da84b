"""What the recipe trains, and with how many tokens: plain numbers to change."""

from dataclasses import dataclass, replace

STREAMS = (2, 4, 8)


@dataclass
class Plan:
    """Sizes of the model and of the runs.

    Attributes:
        pretrain_tokens: stage 1, at one stream.
        stream_tokens: stage 2, for every number of streams, frozen or not.
        stream_batch_size: of stage 2: new parameters want many steps more than large ones.
        corpus_bytes: of source, at most about so many.
        eval_tokens: held-out tokens that the runs are compared on.
        jobs: runs side by side, each on one core; stage 1 is one run in as many processes.
    """

    hidden_size: int = 192
    layers: int = 4
    heads: int = 4
    kv_heads: int = 2
    intermediate_size: int = 512
    vocabulary: int = 2048
    seq_length: int = 256
    batch_size: int = 8
    stream_batch_size: int = 4
    prefix_length: int = 16
    init: str = "random"
    pretrain_tokens: int = 10_000_000
    pretrain_lr: float = 2e-3
    stream_tokens: int = 200_000
    streams_lr: float = 1e-1
    aggregator_lr: float = 1e-3
    train_all_lr: float = 1e-4
    streams: tuple[int, ...] = STREAMS
    seeds: tuple[int, ...] = (0,)
    eval_tokens: int = 20_000
    corpus_bytes: int = 10**9
    jobs: int = 2


QUICK = replace(
    Plan(),
    hidden_size=64,
    layers=2,
    intermediate_size=176,
    vocabulary=512,
    seq_length=64,
    batch_size=8,
    stream_batch_size=4,
    prefix_length=8,
    pretrain_tokens=60_000,
    stream_tokens=10_000,
    streams=(2, 4),
    seeds=(0, 1),
    eval_tokens=4_000,
    corpus_bytes=600_000,
)
