"""How an engine keeps its KV caches."""

from dataclasses import dataclass


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
