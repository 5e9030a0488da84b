"""What all requests for one number of streams have in common."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from parscale_mlx.engine.kept import KeptCaches
from parscale_mlx.engine.row import Row
from parscale_mlx.engine.sampling import Sampler, make_sampler
from parscale_mlx.model import Model

import mlx.core as mx
from parscale_core.engine import Sampling


@dataclass(frozen=True)
class CacheOptions:
    """Of KV caches.

    Attributes:
        bits: quantise them to so many; None for not at all.
        group_size: of the quantised ones.
        quantized_start: quantise them once they hold this many tokens.
        max_size: keep about this many tokens in rotating caches, besides the prefix.
    """

    bits: int | None = None
    group_size: int = 64
    quantized_start: int = 5000
    max_size: int | None = None

    @property
    def can_batch(self) -> bool:
        """mlx-lm's batches know neither quantised caches nor rotating ones that keep a prefix."""
        return self.bits is None and self.max_size is None

    def quantize(self) -> dict[str, int | None]:
        """As mlx-lm's generators name these options."""
        return {
            "kv_bits": self.bits,
            "kv_group_size": self.group_size,
            "quantized_kv_start": self.quantized_start,
        }


@dataclass
class Work:
    """A model with P streams, and how its requests are computed.

    Attributes:
        spared: tokens that XTC never leaves out.
        prefill_step: tokens of a prompt to compute at a time.
        look: a stream that nothing waits in, to look at results with.
    """

    model: Model
    streams: int
    cache: CacheOptions
    kept: KeptCaches
    spared: Sequence[int]
    look: mx.Stream
    prefill_step: int = 2048

    @property
    def keeps(self) -> bool:
        return self.kept.size > 0

    def sampler(self, sampling: Sampling | None) -> Sampler | None:
        """One row's own, or None for the one that all greedy rows share; that one for None.

        Where ranks may not compute the same bits, all take rank 0's tokens.
        """
        parallel = self.model.parallel
        own = None if sampling is None else make_sampler(sampling, self.spared)
        if parallel is None or (own is None and sampling is not None):
            return own
        return parallel.sampler(own)

    def key(self, row: Row) -> Hashable:
        """What caches kept for another request must have been made for, to fit this one."""
        draft = row.request.draft
        return self.streams, None if draft == "ngram" else draft

    def caches_for(self, row: Row) -> tuple[list, int]:
        """Caches to answer a request with, and how many of its prompt's tokens they hold."""
        caches, held = self.kept.take(self.key(row), row.prompt)
        row.state.cached_tokens = held
        if caches is None:
            caches = self.model.make_cache(self.cache.max_size)
        return caches, held

    def keep(self, row: Row, caches: list, tokens: list[int]) -> None:
        # What is not a number would spoil later answers.
        if not row.failed:
            self.kept.keep(self.key(row), caches, tokens)
