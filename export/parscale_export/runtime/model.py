"""Run an exported decoder on onnxruntime, its KV cache staying on the device."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnxruntime as ort

from parscale_export.runtime.kv_cache import Cache, FixedSteps
from parscale_export.runtime.provider import CUDA
from parscale_export.runtime.sampling import Sampling, choose
from parscale_export.runtime.session import (
    attention_heads,
    check_operators,
    find_graph,
    metadata,
    read_graph,
    start_session,
)

ROOM = 256  # tokens by which the buffers of CUDA graphs grow


class Token(NamedTuple):
    """One generated token: of which prompt (counted from 0), its id, its streams' weights.

    The weights, float32 [P], are None unless the graph has the output ``aggregation_weights``.
    """

    prompt: int
    token: int
    streams: np.ndarray | None


class OnnxModel:
    """A graph that ``export_onnx`` wrote, ready to run, one generation at a time.

    Args:
        path: the export's folder, or its .onnx file.
        provider: "cpu", "cuda" or an execution provider's full name; by default CUDA where there
            is a device, else the CPU.
        streams: the P of the graph to open, where a folder holds several; by default model.onnx.
        device_id: which CUDA device.
        threads: threads of an operator on the CPU; by default one a core.
        prefill_chunk: tokens of a prompt to compute at a time, where the graph takes chunks.
        cuda_graph: record the step of one token as a CUDA graph, and replay it (fused operators on
            CUDA only; the model must then be used by one thread).

    Attributes:
        streams: P.
        prefix_length: entries of the cache that are not tokens; 0 where P is 1.
        provider: the execution provider's full name.
        aggregation_weights: whether the graph gives the streams' weights.

    Raises:
        FileNotFoundError: no graph there, or no external data.
        ValueError: not one of our graphs, external data that is truncated or outside the folder,
            or a provider that is not there or cannot run the graph.
    """

    def __init__(
        self,
        path: str | Path,
        provider: str | None = None,
        *,
        streams: int | None = None,
        device_id: int = 0,
        threads: int | None = None,
        prefill_chunk: int = 512,
        cuda_graph: bool = False,
    ):
        self.file = find_graph(Path(path), streams)
        graph = read_graph(self.file)
        about = metadata(graph, self.file)
        self.streams, self.prefix_length = int(about["streams"]), int(about["prefix_length"])
        self.kv_layout, self.ops = about["kv_layout"], about["ops"]
        self.precision = about["precision"]
        self.all_logits = about["all_logits"] == "true"
        self.context_length = int(about["context_length"]) or None
        self.shares_buffer = self.ops == "fused"
        check_operators(self.file, self.ops)
        self.prefill_chunk = prefill_chunk
        if cuda_graph and not self.shares_buffer:
            raise ValueError(f"{self.file}: a CUDA graph needs an export with ops fused")
        self.session, self.provider = start_session(
            self.file,
            about,
            provider,
            heads=attention_heads(graph),
            device_id=device_id,
            threads=threads,
            cuda_graph=cuda_graph,
        )
        self.cuda_graph = cuda_graph
        self.device = ("cuda", device_id) if self.provider == CUDA else ("cpu", 0)
        inputs = {value.name: value.type.tensor_type for value in graph.graph.input}
        self.pasts = [name for name in inputs if name.startswith("past_key_values.")]
        self.presents = [name.replace("past_key_values.", "present.") for name in self.pasts]
        cache = inputs[self.pasts[0]]
        self._kv_heads, self._head_dim = (cache.shape.dim[axis].dim_value for axis in (1, 3))
        self._cache_type = cache.elem_type
        results = [v for v in graph.graph.output if not v.name.startswith("present.")]
        self.outputs = [value.name for value in results]
        self.output_widths = [v.type.tensor_type.shape.dim[2].dim_value for v in results]
        self.aggregation_weights = "aggregation_weights" in self.outputs
        self.vocab_size = self.output_widths[0]
        self._buffers: list[ort.OrtValue] = []
        self._fixed: FixedSteps | None = None
        self._graphs = 0

    def logits(self, token_ids: Sequence[int]) -> np.ndarray:
        """Logits of one sequence, float32 [L, vocab]; row i follows token i.

        Raises:
            ValueError: the graph gives the last token's logits only, or no tokens were given.
        """
        if not self.all_logits:
            raise ValueError(
                f"{self.file}: exported without all_logits, so it has only the last token's logits"
            )
        ids, mask = self._pad([token_ids])
        cache = self._start(1, ids.shape[1])
        parts = [cache.step(chunk, mask[:, :end])[0] for chunk, end in self._chunks(ids)]
        return np.concatenate(parts, axis=1)[0]

    def continuation_logits(self, prompt: Sequence[int], tokens: Sequence[int]) -> np.ndarray:
        """Logits after a prompt and after each of some given tokens, one step at a time.

        Returns:
            float32 [1 + len(tokens), vocab]; any export can, with the last token's logits alone.
        """
        ids, _ = self._pad([[*prompt, *tokens]])
        mask, first = np.ones_like(ids), len(prompt)
        cache = self._start(1, ids.shape[1])
        for chunk, end in self._chunks(ids[:, :first]):
            results = cache.step(chunk, mask[:, :end])
        rows = [results[0][0, -1]]
        for n in range(first, ids.shape[1]):
            rows.append(cache.step(ids[:, n : n + 1], mask[:, : n + 1])[0][0, -1])
        return np.stack(rows)

    @staticmethod
    def describe(path: str | Path, streams: int | None = None) -> dict[str, str]:
        """An export's metadata: P, prefix length, layout, operators, precision, source, hashes.

        Raises:
            FileNotFoundError, ValueError: as for opening it.
        """
        file = find_graph(Path(path), streams)
        return metadata(read_graph(file), file)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_tokens: int = 256,
        *,
        stop_tokens: Sequence[int] | None = None,
        callback: Callable[[Token], None] | None = None,
        seed: int | None = None,
        **sampling,
    ) -> list[list[int]]:
        """Generate for a batch of prompts (token ids, of any lengths); greedy by default.

        Args:
            max_tokens: how many new tokens for each prompt, at most.
            stop_tokens: ids that end a sequence, kept as its last token; by default none does.
            callback: called with each token as it comes.
            seed: of the random numbers; by default another each time.
            sampling: the fields of ``Sampling``, such as ``temperature`` and ``top_p``.

        Returns:
            The new ids of each prompt.

        Raises:
            ValueError: an empty prompt, a token outside the vocabulary, or more tokens in all than
                the graph's rotary tables reach.
        """
        answers: list[list[int]] = [[] for _ in prompts]
        for token in self.stream(
            prompts, max_tokens, stop_tokens=stop_tokens, seed=seed, **sampling
        ):
            answers[token.prompt].append(token.token)
            if callback is not None:
                callback(token)
        return answers

    def stream(
        self,
        prompts: Sequence[Sequence[int]],
        max_tokens: int = 256,
        *,
        stop_tokens: Sequence[int] | None = None,
        seed: int | None = None,
        **sampling,
    ) -> Iterator[Token]:
        """Generate as ``generate`` does, yielding tokens as they come, one a prompt and step."""
        how, random = Sampling(**sampling), np.random.default_rng(seed)
        if not prompts or max_tokens < 1:
            return
        stops = frozenset(stop_tokens or ())
        ids, prompt_mask = self._pad(prompts)
        batch, length = ids.shape
        # The last token is not fed back, so it needs no place.
        cache = self._start(batch, length + max_tokens - 1)
        mask = np.ones((batch, length + max_tokens), np.int64)
        mask[:, :length] = prompt_mask
        for chunk, end in self._chunks(ids):
            results = cache.step(chunk, mask[:, :end])
        fixed = self._fixed_steps(batch) if self.cuda_graph else None
        tokens = [list(prompt) for prompt in prompts]
        going = set(range(batch))
        for step in range(max_tokens):
            weights = results[1] if len(results) > 1 else None
            for row in sorted(going):
                token = choose(results[0][row, -1], tokens[row], how, random)
                tokens[row].append(token)
                if token in stops:
                    going.discard(row)
                yield Token(row, token, None if weights is None else weights[row, -1])
            if not going or step == max_tokens - 1:
                return
            newest = np.array([[row[-1]] for row in tokens])
            results = (fixed or cache).step(newest, mask[:, : length + step + 1])

    def _pad(self, prompts: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
        """Token ids and mask, int64 [B, L], padded on the left."""
        length = max(map(len, prompts))
        ids, mask = (np.zeros((len(prompts), length), np.int64) for _ in range(2))
        for row, prompt in enumerate(prompts):
            if not len(prompt):
                raise ValueError(f"prompt {row + 1} is empty: it needs at least one token")
            ids[row, length - len(prompt) :] = prompt
            mask[row, length - len(prompt) :] = 1
        wrong = ids[(ids < 0) | (ids >= self.vocab_size)]
        if wrong.size:
            raise ValueError(
                f"token {wrong[0]} is not in the vocabulary of {self.vocab_size} tokens"
            )
        return ids, mask

    def _chunks(self, ids: np.ndarray) -> Iterator[tuple[np.ndarray, int]]:
        """Parts of a prompt to compute one after the other, and where each ends."""
        batch, length = ids.shape
        rows = batch * (self.streams if self.kv_layout == "batch" else 1)
        # GroupQueryAttention takes several tokens on top of a past for a single row only.
        size = self.prefill_chunk if self.ops == "standard" or rows == 1 else length
        for start in range(0, length, size):
            end = min(start + size, length)
            yield ids[:, start:end], end

    def _start(self, batch: int, tokens: int) -> Cache:
        """An empty KV cache with room for so many tokens of each sequence."""
        if self.context_length is not None and tokens > self.context_length:
            raise ValueError(
                f"{tokens} tokens are more than the {self.context_length} that "
                f"{self.file.name} was exported for"
            )
        rows = batch * (self.streams if self.kv_layout == "batch" else 1)
        if self.cuda_graph:  # so that one recording serves generations of various lengths
            room = -(-tokens // ROOM) * ROOM
            tokens = min(room, self.context_length or room)
        capacity = tokens + self.prefix_length if self.shares_buffer else 0
        shape = [rows, self._kv_heads, capacity, self._head_dim]
        held = self._buffers[0].shape() if self._buffers else [0, 0, 0, 0]
        if not self.shares_buffer or held[0] != rows or held[2] < capacity:
            self._fixed = None
            self._buffers = []  # before the new ones, so that both are not held at once
            self._buffers = [self._allocate(shape) for _ in self.pasts]
        return Cache(self, self._buffers)

    def _fixed_steps(self, batch: int) -> FixedSteps:
        """Steps at the addresses of the buffers in use, recorded once for as long as they last."""
        if self._fixed is None:
            self._graphs += 1
            capacity = self._buffers[0].shape()[2] - self.prefix_length
            self._fixed = FixedSteps(self, self._buffers, batch, capacity, self._graphs)
        return self._fixed

    def _allocate(self, shape: list[int]) -> ort.OrtValue:
        return ort.OrtValue.ortvalue_from_shape_and_type(shape, self._cache_type, *self.device)
