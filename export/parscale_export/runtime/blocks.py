"""Where the KV cache entries of sequences lie, and copies of them from one place to another.

A row of a cache begins with the prefix's entries. Operators that share a buffer (fused) have the
tokens' entries right behind them, then room; those that concatenate (standard) have padding there,
and the tokens' entries at the row's end.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from parscale_export.runtime.copies import Buffers

if TYPE_CHECKING:
    from parscale_export.runtime.model import OnnxModel

ROOM = 256  # tokens by which buffers grow


@dataclass(frozen=True)
class Block:
    """KV cache entries of some sequences, in the device's memory.

    Attributes:
        buffers: one for each past of the graph, [rows, kv_heads, T, head_dim]; where streams are
            rows, row p * B + b is stream p of sequence b.
    """

    model: "OnnxModel"
    buffers: Buffers

    @classmethod
    def allocate(cls, model: "OnnxModel", sequences: int, tokens: int) -> "Block":
        """Room for so many tokens of each sequence, and for the prefix."""
        return cls(
            model, model.allocate(sequences * model.cache_rows, tokens + model.prefix_length)
        )

    @property
    def sequences(self) -> int:
        return self.buffers[0].shape()[0] // self.model.cache_rows

    @property
    def room(self) -> int:
        """Tokens of each sequence that fit."""
        return self.buffers[0].shape()[2] - self.model.prefix_length

    @property
    def size(self) -> int:
        """Bytes."""
        return sum(value.tensor_size_in_bytes() for value in self.buffers)

    def rows(self, places: Sequence[int]) -> list[int]:
        batch, streams = self.sequences, range(self.model.cache_rows)
        return [stream * batch + place for stream in streams for place in places]

    def first(self, length: int) -> int:
        """The column where a sequence of so many tokens begins."""
        end = self.model.prefix_length + self.room
        return self.model.prefix_length if self.model.shares_buffer else end - length


@dataclass(frozen=True)
class Stored:
    """A sequence's entries: those of the first ``length`` tokens at a place in a block."""

    block: Block
    place: int
    length: int

    @property
    def size(self) -> int:
        """Bytes that a copy of it needs."""
        prefix = self.block.model.prefix_length
        columns = self.block.sequences * (self.block.room + prefix)
        return self.block.size // columns * (self.length + prefix)

    def copy(self, tokens: int, room: int) -> "Stored":
        """The entries of its first tokens in a block of their own, with room for more."""
        model = self.block.model
        target = Block.allocate(model, 1, room if model.shares_buffer else tokens)
        columns = (target.first(tokens), self.block.first(self.length), tokens)
        _copy(target, [0], self.block, [self.place], *columns)
        return Stored(target, 0, tokens)


def gather(target: Block, sequences: Sequence[tuple[int, Stored]]) -> None:
    """Copy sequences into a block, each to its place there.

    One may come from the same block: nothing is overwritten before it was read.
    """
    blocks = {id(stored.block): stored.block for _, stored in sequences}
    for block in sorted(blocks.values(), key=lambda block: block is not target):
        some = [(place, stored) for place, stored in sequences if stored.block is block]
        longest = max(stored.length for _, stored in some)
        columns = (target.first(longest), block.first(longest), longest)
        _copy(target, [p for p, _ in some], block, [s.place for _, s in some], *columns)


def _copy(
    target: Block,
    to_places: Sequence[int],
    source: Block,
    from_places: Sequence[int],
    to_column: int,
    from_column: int,
    tokens: int,
) -> None:
    prefix, copier = target.model.prefix_length, target.model.copier
    to_rows, from_rows = target.rows(to_places), source.rows(from_places)
    if to_column == from_column == prefix:  # all in one
        to_column, from_column, tokens = 0, 0, prefix + tokens
    else:
        copier.copy(target.buffers, to_rows, 0, source.buffers, from_rows, 0, prefix)
    copier.copy(target.buffers, to_rows, to_column, source.buffers, from_rows, from_column, tokens)
