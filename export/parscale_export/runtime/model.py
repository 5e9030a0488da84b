"""Run an exported decoder on onnxruntime, its KV cache staying on the device."""

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import onnxruntime as ort
from parscale_core.engine import Sampling
from parscale_core.engine.check import check_sampling
from parscale_core.error_text import not_finite

from parscale_export.runtime.blocks import Block
from parscale_export.runtime.copies import Buffers, RowCopier
from parscale_export.runtime.decoder import Decoder
from parscale_export.runtime.hashes import check_hashes
from parscale_export.runtime.kv_cache import FixedSteps, result_types
from parscale_export.runtime.likeliest import Likeliest
from parscale_export.runtime.prefill import Growing, chunks
from parscale_export.runtime.provider import CUDA, records_steps
from parscale_export.runtime.sampling import choose, generator, takes_likeliest
from parscale_export.runtime.session import (
    attention_heads,
    check_operators,
    find_graph,
    metadata,
    read_graph,
    start_session,
)
from parscale_export.runtime.slots import Slots


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
        cuda_graph: record the step of one token as a CUDA graph, and replay it; by default with
            fused operators on CUDA, which alone can. A model that does is to be used by one thread,
            and while a step is recorded no other thread of the process may use CUDA.
        check: compare the data files with the hashes in the graph.

    Attributes:
        streams: P.
        prefix_length: entries of the cache that are not tokens; 0 where P is 1.
        provider: the execution provider's full name.
        aggregation_weights: whether the graph gives the streams' weights.

    Raises:
        FileNotFoundError: no graph there, or no external data.
        ValueError: not one of our graphs, external data that is damaged or outside the folder,
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
        cuda_graph: bool | None = None,
        check: bool = True,
    ):
        self.file = find_graph(Path(path), streams)
        graph = read_graph(self.file)
        about = metadata(graph, self.file)
        if check:
            check_hashes(self.file, about)
        self.streams, self.prefix_length = int(about["streams"]), int(about["prefix_length"])
        self.kv_layout, self.ops = about["kv_layout"], about["ops"]
        self.precision, self.activations = about["precision"], about["activations"]
        self.all_logits = about["all_logits"] == "true"
        self.context_length = int(about["context_length"]) or None
        self.shares_buffer = self.ops == "fused"
        check_operators(self.file, self.ops)
        if prefill_chunk < 1:
            raise ValueError(f"prefill_chunk {prefill_chunk}: must be at least 1")
        self.prefill_chunk = prefill_chunk
        if cuda_graph and not self.shares_buffer:
            raise ValueError(f"{self.file}: a CUDA graph needs an export with ops fused")
        self.session, self.steps, self.provider = start_session(
            self.file,
            about,
            provider,
            heads=attention_heads(graph),
            device_id=device_id,
            threads=threads,
            cuda_graph=cuda_graph,
        )
        self.cuda_graph = records_steps(about, self.provider, cuda_graph)
        self.device = ("cuda", device_id) if self.provider == CUDA else ("cpu", 0)
        inputs = {value.name: value.type.tensor_type for value in graph.graph.input}
        self.pasts = [name for name in inputs if name.startswith("past_key_values.")]
        self.presents = [name.replace("past_key_values.", "present.") for name in self.pasts]
        cache = inputs[self.pasts[0]]
        self._kv_heads, self._head_dim = (cache.shape.dim[axis].dim_value for axis in (1, 3))
        self.cache_type = cache.elem_type
        self.cache_rows = self.streams if self.kv_layout == "batch" else 1
        # GroupQueryAttention takes several tokens on top of a past for a single row only.
        self.takes_chunks = self.ops == "standard" or self.cache_rows == 1
        results = [v for v in graph.graph.output if not v.name.startswith("present.")]
        self.outputs = [value.name for value in results]
        self.output_widths = [v.type.tensor_type.shape.dim[2].dim_value for v in results]
        self.aggregation_weights = "aggregation_weights" in self.outputs
        self.vocab_size = self.output_widths[0]
        self._slots: Slots | None = None
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
        self._check([token_ids], len(token_ids))
        growing = Growing(self, len(token_ids))
        parts = [growing.extend(part)[0] for part in chunks(self, token_ids, self.prefill_chunk)]
        return np.concatenate(parts, axis=1)[0]

    def continuation_logits(self, prompt: Sequence[int], tokens: Sequence[int]) -> np.ndarray:
        """Logits after a prompt and after each of some given tokens, one step at a time.

        Returns:
            float32 [1 + len(tokens), vocab]; any export can, with the last token's logits alone.
        """
        self._check([prompt, [*prompt, *tokens]], len(prompt) + len(tokens))
        growing = Growing(self, len(prompt) + len(tokens))
        for part in chunks(self, prompt, self.prefill_chunk):
            results = growing.extend(part)
        rows = [results[0][0, -1]]
        rows += [growing.extend([token])[0][0, -1] for token in tokens]
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
        **sampling: Any,
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
        **sampling: Any,
    ) -> Iterator[Token]:
        """Generate as ``generate`` does, yielding tokens as they come."""
        if not prompts or max_tokens < 1:
            return
        given = {name: value for name, value in sampling.items() if value is not None}
        how = Sampling(max_tokens=max_tokens, **given)
        check_sampling(how, self.vocab_size)
        # The last token is not fed back, so it needs no place.
        self._check(prompts, max(map(len, prompts)) + max_tokens - 1)
        stops, came = frozenset(stop_tokens or ()), list[Token]()
        rows = [
            _Row(n, prompt, how, None if seed is None else seed + n, stops, came)
            for n, prompt in enumerate(prompts)
        ]
        decoder = Decoder(self, len(rows))
        decoder.waiting.extend(rows)
        try:
            while not decoder.idle:
                decoder.turn()
                yield from came
                came.clear()
        finally:
            decoder.clear()

    def _check(self, prompts: Sequence[Sequence[int]], longest: int) -> None:
        for n, prompt in enumerate(prompts):
            if not len(prompt):
                raise ValueError(f"prompt {n + 1} is empty: it needs at least one token")
            for token in prompt:
                if not 0 <= token < self.vocab_size:
                    raise ValueError(
                        f"token {token} is not in the vocabulary of {self.vocab_size} tokens"
                    )
        if self.context_length is not None and longest > self.context_length:
            raise ValueError(
                f"{longest} tokens are more than the {self.context_length} that "
                f"{self.file.name} was exported for"
            )

    def check_numbers(self, logits: np.ndarray) -> None:
        """Raise ArithmeticError where logits [vocab] are not numbers."""
        if not np.isfinite(logits.max()):
            raise ArithmeticError(not_finite(f"{self.file}: the logits have"))

    def slots(self, most: int) -> Slots:
        """Slots to decode in; CUDA graphs are recorded for their addresses, so these are kept."""
        if not self.cuda_graph:
            return Slots(self, most)
        if self._slots is None:
            self._slots = Slots(self, most)
        return self._slots

    def fixed_steps(self, block: Block) -> FixedSteps:
        """Steps at a block's addresses, recorded once for as long as it lasts."""
        self._graphs += 1
        return FixedSteps(self, block.buffers, block.sequences, block.room, self._graphs)

    @cached_property
    def likeliest(self) -> Likeliest:
        """Finds the likeliest tokens where the logits are."""
        return Likeliest(self.provider, self.device, result_types(self.steps, self)[0])

    @cached_property
    def copier(self) -> RowCopier:
        """Copies between KV caches of this model."""
        return RowCopier(len(self.pasts), self.cache_type, self.provider, self.device)

    def allocate(self, rows: int, columns: int) -> Buffers:
        """Memory of a KV cache, all zeros.

        What onnxruntime hands out was used before, and may hold NaN, which a probability of zero
        does not take away.
        """
        shape = [rows, self._kv_heads, columns, self._head_dim]
        size = 4 if self.cache_type == onnx.TensorProto.FLOAT else 2
        zeros = np.zeros(shape, f"u{size}")  # whatever the type, zero is all bits zero
        buffers = [
            ort.OrtValue.ortvalue_from_shape_and_type(shape, self.cache_type, *self.device)
            for _ in self.pasts
        ]
        for value in buffers if zeros.size else ():
            value.update_inplace(zeros)
        return buffers


class _Row:
    """A prompt of ``OnnxModel.stream`` and its answer so far."""

    def __init__(
        self,
        number: int,
        prompt: Sequence[int],
        sampling: Sampling,
        seed: int | None,
        stops: frozenset[int],
        came: list[Token],
    ):
        self.number, self.sampling, self.stops = number, sampling, stops
        self.tokens, self.end = list(prompt), len(prompt) + sampling.max_tokens
        self.cached_tokens, self.finished = 0, False
        self.random, self.came = generator(seed), came
        self.greedy = takes_likeliest(sampling)

    def take(self, logits: np.ndarray, weights: np.ndarray | None) -> None:
        self.take_token(choose(logits, self.tokens, self.sampling, self.random), weights)

    def take_token(self, token: int, weights: np.ndarray | None) -> None:
        self.tokens.append(token)
        self.came.append(Token(self.number, token, weights))
        self.finished = token in self.stops or len(self.tokens) == self.end

    def fail(self, error: Exception) -> None:
        raise error
