"""Generation in MLX: one answer as a stream, or several prompts as one continuous batch."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from math import ceil
from pathlib import Path
from typing import Any

from parscale_mlx import load, prompt_cache, stream_generate
from parscale_mlx.load import find_adapter, identity, load_draft
from parscale_mlx.ranks import check_same, check_same_input
from parscale_mlx.streams import StreamRecorder

import mlx.core as mx
from mlx_lm.generate import BatchGenerator
from mlx_lm.sample_utils import make_logits_processors, make_sampler
from parscale_core.checkpoint.folder import find_folder
from parscale_core.checkpoint.packaged import EMBEDDED

from parscale_cli.answer import Piece, StopStrings
from parscale_cli.sampling import Sampling

PREFILL_STEP = 2048


class MlxRuntime:
    """A model loaded in MLX, with the options of its KV cache.

    Args:
        model: a folder or a hub name; None for the default model.
        adapters: folders of stream adapters over the model.
        streams: how many to run; by default the most that the model or an adapter has.
        prompt_cache: a file to take a KV cache from, and to leave it in.
        draft_model: a folder or hub name, for speculative decoding.
        kv_bits, kv_group_size, quantized_kv_start, max_kv_size: as mlx-lm's ``generate_step``.
        parallel: as ``parscale_mlx.load``.

    Attributes:
        keep_cache: hold on to the KV cache of one answer for the next, as a conversation wants.

    Raises:
        ValueError: the draft model has another vocabulary, the prompt cache another model, or no
            adapter has as many streams.
    """

    def __init__(
        self,
        model: str | None,
        *,
        adapters: Sequence[Path] = (),
        streams: int | None = None,
        prompt_cache: Path | None = None,
        draft_model: str | None = None,
        num_draft_tokens: int = 3,
        kv_bits: str | None = None,
        kv_group_size: str = "64",
        quantized_kv_start: int = 5000,
        max_kv_size: int | None = None,
        parallel: str | None = None,
    ):
        folder = find_folder(model or EMBEDDED)
        adapter = find_adapter(folder, adapters, streams)
        # The default model is small enough to be held in plain weights, where those are faster.
        dequantize = model is None and mx.default_device() == mx.cpu
        self.model, self.tokenizer = load(
            folder, adapter_path=adapter, dequantize=dequantize, parallel=parallel
        )
        self.streams = self.model.args.streams
        self.cache_file, self.max_kv_size = prompt_cache, max_kv_size
        self.keep_cache = False
        self.kept: tuple[list, list[int]] | None = None
        self.options: dict = {}
        if kv_bits is not None:
            self.options = {
                "kv_bits": int(kv_bits),
                "kv_group_size": int(kv_group_size),
                "quantized_kv_start": quantized_kv_start,
            }
        if draft_model is not None:
            draft_folder = find_folder(draft_model)
            if self.model.parallel is not None:
                check_same(self.model.parallel.group, identity(draft_folder))
            draft = load_draft(draft_folder, self.tokenizer)
            self.options |= {"draft_model": draft, "num_draft_tokens": num_draft_tokens}

    def require_streams(self) -> None:
        return

    def answer(
        self, prompts: list[list[int]], sampling: Sampling, *, with_streams: bool
    ) -> Iterator[Piece]:
        if self.model.parallel is not None:
            group = self.model.parallel.group
            check_same_input(group, "prompt or sampling", prompts, asdict(sampling))
        if len(prompts) > 1:
            return answer_batch(self.model, self.tokenizer, prompts, sampling)
        if "draft_model" in self.options:
            return self._stream(prompts[0], sampling)
        return self._answer_with_cache(prompts[0], sampling, with_streams)

    def add_streams(self, prompts: list[list[int]], pieces: Iterator[Piece]) -> Iterator[Piece]:
        # Where one call gives several tokens, or a batch's rows come and go, the weights are had
        # more simply from one forward pass over the finished text.
        if len(prompts) == 1 and "draft_model" not in self.options:
            yield from pieces
            return
        finished = list(pieces)
        for n, ids in enumerate(prompts):
            own = [piece for piece in finished if piece.prompt == n]
            tokens = ids + [piece.token for piece in own]
            weights: Any = self.model.aggregation_weights(mx.array([tokens[:-1]]))
            for piece, row in zip(own, weights.tolist()[0][len(ids) - 1 :], strict=True):
                piece.streams = row
        yield from finished

    def peak_memory(self) -> int:
        return mx.get_peak_memory()

    def _stream(self, ids: list[int], sampling: Sampling, **options) -> Iterator[Piece]:
        return answer_one(self.model, self.tokenizer, ids, sampling, **self.options, **options)

    def _answer_with_cache(
        self, ids: list[int], sampling: Sampling, with_streams: bool
    ) -> Iterator[Piece]:
        cache, held = self.kept or (None, [])
        if self.cache_file is not None and self.cache_file.exists():
            cache, held = prompt_cache.load(self.cache_file, self.model)
        cache, rest = prompt_cache.reuse(self.model, cache, held, ids, max_kv_size=self.max_kv_size)
        tokens = list(ids)
        try:
            pieces = self._stream(rest, sampling, with_streams=with_streams, prompt_cache=cache)
            for piece in pieces:
                tokens.append(piece.token)
                yield piece
        finally:
            held = prompt_cache.held_tokens(cache, tokens)
            self.kept = (cache, held) if self.keep_cache else None
        if self.cache_file is not None:
            prompt_cache.save(self.cache_file, self.model, cache, held)


def answer_one(
    model, tokenizer, ids: list[int], sampling: Sampling, *, with_streams: bool = False, **options
) -> Iterator[Piece]:
    """Generate one answer; ``options`` are those of ``parscale_mlx.stream_generate``."""
    stop = StopStrings(sampling.stop)
    # mlx-lm prefills all but the last token, a chunk a call, before the calls that give tokens.
    prefill_calls = ceil((len(ids) - 1) / PREFILL_STEP)
    subject: Any = StreamRecorder(model, skip=prefill_calls) if with_streams else model
    choosing = _choosing(sampling)
    if "draft_model" in options:
        choosing["logits_processors"] = [
            _after(mx.array(ids[:-1], mx.uint32), penalty)
            for penalty in choosing["logits_processors"]
        ]
    responses = stream_generate(
        subject,
        tokenizer,
        ids,
        max_tokens=sampling.max_tokens,
        prefill_step_size=PREFILL_STEP,
        **choosing,
        **options,
    )
    for step, response in enumerate(responses):
        streams = subject.weights(step) if with_streams else None
        text, finish = stop.push(response.text), response.finish_reason
        if stop.found:
            yield Piece(0, text, response.token, "stop", streams)
            return
        if finish:
            text += stop.flush()
        yield Piece(0, text, response.token, finish, streams)


def answer_batch(model, tokenizer, prompts: list[list[int]], sampling: Sampling) -> Iterator[Piece]:
    """Generate for several prompts at once; pieces of different prompts are interleaved."""
    choosing = _choosing(sampling)
    if model.parallel is not None:
        choosing["sampler"] = model.parallel.sampler(choosing["sampler"])
    generator = BatchGenerator(
        model,
        max_tokens=sampling.max_tokens,
        stop_tokens=[[token] for token in tokenizer.eos_token_ids],
        **choosing,
    )
    try:
        uids = generator.insert(prompts)
        order = {uid: n for n, uid in enumerate(uids)}
        texts = dict.fromkeys(uids, tokenizer.detokenizer)
        stops = {uid: StopStrings(sampling.stop) for uid in uids}
        while responses := generator.next_generated():
            for response in responses:
                uid, finish = response.uid, response.finish_reason
                text, stop = texts[uid], stops[uid]
                if finish != "stop":
                    text.add_token(response.token)
                if finish:
                    text.finalize()
                ready = stop.push(text.last_segment)
                if stop.found:
                    if not finish:
                        generator.remove([uid])
                    finish = "stop"
                elif finish:
                    ready += stop.flush()
                yield Piece(order[uid], ready, response.token, finish)
    finally:
        generator.close()


def _after(before: mx.array, penalty: Callable) -> Callable:
    """A penalty on tokens that follow others: with a draft, mlx-lm leaves the prompt's out."""
    return lambda tokens, logits: penalty(mx.concatenate([before, tokens]), logits)


def _choosing(sampling: Sampling) -> dict:
    if sampling.seed is not None:
        mx.random.seed(sampling.seed)
    context = sampling.repetition_context
    return {
        "sampler": make_sampler(
            temp=sampling.temp,
            top_p=sampling.top_p if sampling.top_p < 1 else 0.0,
            min_p=sampling.min_p,
            top_k=sampling.top_k,
        ),
        "logits_processors": make_logits_processors(
            repetition_penalty=sampling.repetition_penalty,
            repetition_context_size=context,
            presence_penalty=sampling.presence_penalty,
            presence_context_size=context,
            frequency_penalty=sampling.frequency_penalty,
            frequency_context_size=context,
        ),
    }
