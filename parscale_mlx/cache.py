"""KV caches that hold a model's prefix: mlx-lm's own, with the prefix pinned.

The prefix is the first ``prefix_length`` positions of an ordinary cache, so nothing in mlx-lm needs
to know of it. What must not happen is that it is taken out again: by trimming further back than the
first token, by a rotating cache that forgets its oldest entries, or by a merge into a batch cache
that keeps no entries. These classes close those three doors.
"""

# mlx-lm's caches carry no types, and each of these gives its attributes another one.
# mypy: disable-error-code="misc,attr-defined,has-type,assignment"

from collections.abc import Sequence
from typing import Any, NoReturn, Protocol

import mlx.core as mx
from mlx_lm.models import cache as mlx_lm_cache
from mlx_lm.models.base import create_causal_mask
from mlx_lm.models.cache import KVCache, QuantizedKVCache, RotatingKVCache


class Cache(Protocol):
    """What this package uses of a layer's KV cache, one of these here or of mlx-lm's.

    Attributes:
        keys, values: arrays, or an array's three parts where it is quantised.
        offset: entries held, a prefix included; in a batch's cache an array, [B].
    """

    keys: Any
    values: Any
    offset: int

    @property
    def state(self) -> Any: ...

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[Any, Any]: ...

    def trim(self, n: int) -> int: ...

    def empty(self) -> bool: ...


Caches = Sequence[Cache | None]  # one a layer; None where a layer holds nothing


class _PinnedPrefix:
    """What the three caches share: the prefix's length, in the saved state and against trimming."""

    prefix_length: int

    @property
    def state(self) -> tuple[Any, ...]:
        return (*super().state, mx.array(self.prefix_length))

    @state.setter
    def state(self, value: tuple[Any, ...]) -> None:
        *state, prefix_length = value
        self.prefix_length = int(prefix_length)
        super(_PinnedPrefix, type(self)).state.fset(self, tuple(state))

    def trim(self, n: int) -> int:
        return super().trim(min(n, self.offset - self.prefix_length))

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[Any, Any]:
        # mlx-lm's evaluation gives a fresh cache a whole batch; the prefix is one row until then.
        batch = keys.shape[0]
        if self.offset == self.prefix_length and batch > 1:
            self._repeat_rows(batch)
        return super().update_and_fetch(keys, values)

    def _repeat_rows(self, batch: int) -> None:
        if self.keys.shape[0] == 1:
            self.keys = mx.repeat(self.keys, batch, axis=0)
            self.values = mx.repeat(self.values, batch, axis=0)


class PrefixKVCache(_PinnedPrefix, KVCache):
    """An mlx-lm ``KVCache`` that starts with a prefix.

    Args:
        keys, values: the prefix, [1, P * kv_heads, prefix_length, head_dim], keys rotated.
    """

    def __init__(self, keys: mx.array, values: mx.array):
        super().__init__()
        self.prefix_length = 0
        self.update_and_fetch(keys, values)
        self.prefix_length = keys.shape[2]

    def to_quantized(self, group_size: int = 64, bits: int = 4) -> "PrefixQuantizedKVCache":
        quantized = super().to_quantized(group_size=group_size, bits=bits)
        pinned = PrefixQuantizedKVCache(group_size=group_size, bits=bits)
        pinned.keys, pinned.values = quantized.keys, quantized.values
        pinned.offset, pinned.prefix_length = quantized.offset, self.prefix_length
        return pinned


class PrefixQuantizedKVCache(_PinnedPrefix, QuantizedKVCache):
    """What a ``PrefixKVCache`` becomes when mlx-lm quantises the KV cache."""

    prefix_length = 0

    def _repeat_rows(self, batch: int) -> None:
        if self.keys[0].shape[0] == 1:
            self.keys, self.values = (
                tuple(mx.repeat(part, batch, axis=0) for part in parts)
                for parts in (self.keys, self.values)
            )


class PrefixRotatingKVCache(_PinnedPrefix, RotatingKVCache):
    """A rotating cache that never evicts the prefix nor the first few tokens after it.

    Args:
        keys, values: the prefix, [1, P * kv_heads, prefix_length, head_dim], keys rotated.
        max_size: tokens to hold besides the prefix.
        keep: the first tokens that are never evicted (attention sinks), besides the prefix.
    """

    def __init__(self, keys: mx.array, values: mx.array, max_size: int, keep: int = 4):
        prefix_length = keys.shape[2]
        super().__init__(max_size=prefix_length + max_size, keep=prefix_length + keep)
        self.prefix_length = 0
        self._update_concat(keys, values)
        self.prefix_length = prefix_length

    def make_mask(
        self, N: int, window_size: int | None = None, return_array: bool = False
    ) -> mx.array | str | None:
        # mlx-lm slides its window over the kept entries too; they must stay visible to every query.
        held = min(self.max_size - 1, self.offset)
        if N == 1 or window_size is not None or held + N <= self.max_size:
            return super().make_mask(N, window_size=window_size, return_array=return_array)
        window = create_causal_mask(N, held, window_size=self.max_size - self.keep)
        kept = mx.arange(held + N) < self.keep
        return window | (kept & create_causal_mask(N, held))

    @classmethod
    def merge(cls, caches: Sequence[Cache]) -> NoReturn:
        raise ValueError(
            "a rotating KV cache cannot join a batch: mlx-lm's batch version would evict the "
            "prefix; leave max_kv_size out, or generate one prompt at a time"
        )


# mlx-lm's load_prompt_cache looks a saved cache's class up by name in its own module.
for _cache in (PrefixKVCache, PrefixQuantizedKVCache, PrefixRotatingKVCache):
    setattr(mlx_lm_cache, _cache.__name__, _cache)
