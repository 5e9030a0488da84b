"""What all requests for one number of streams have in common."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from parscale_mlx.cache import Cache
from parscale_mlx.engine.kept import KeptCaches
from parscale_mlx.engine.row import Row
from parscale_mlx.engine.sampling import Sampler, make_sampler
from parscale_mlx.model import Model

import mlx.core as mx
from parscale_core.engine import CacheOptions, Sampling


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

    def caches_for(self, row: Row) -> tuple[list[Cache], int]:
        """Caches to answer a request with, and how many of its prompt's tokens they hold."""
        caches, held = self.kept.take(self.key(row), row.prompt)
        row.state.cached_tokens = held
        if caches is None:
            caches = self.model.make_cache(self.cache.max_size)
        return caches, held

    def keep(self, row: Row, caches: list[Cache], tokens: list[int]) -> None:
        # What is not a number would spoil later answers.
        if not row.failed:
            self.kept.keep(self.key(row), caches, tokens)
