"""Complete many prompts in one continuous batch, each up to its own stop strings."""

from collections.abc import Iterator, Sequence
from typing import Any

from parscale_mlx.model import Model
from parscale_mlx.ranks import check_same_input
from parscale_mlx.taps import Pieces, RowTap, StreamTap

import mlx.core as mx
from mlx_lm.generate import BatchGenerator
from mlx_lm.sample_utils import make_sampler
from mlx_lm.tokenizer_utils import TokenizerWrapper


def complete(
    model: Model,
    tokenizer: TokenizerWrapper,
    prompts: Sequence[tuple[str | list[int], Sequence[str]]],
    *,
    max_tokens: int,
    batch_size: int = 8,
    temp: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
) -> Iterator[tuple[int, str]]:
    """Generate after each prompt.

    Args:
        prompts: texts, taken as they are, or token ids, each with the strings before which its
            answer ends.

    Yields:
        A prompt's number and its answer, in the order in which they are finished.
    """
    mx.random.seed(seed)
    sampler = make_sampler(temp, top_p=top_p if top_p < 1 else 0.0)
    if model.parallel is not None:
        asked = [prompts, max_tokens, batch_size, temp, top_p, seed]
        check_same_input(model.parallel.group, "prompts or sampling", asked)
        sampler = model.parallel.sampler(sampler)
    tap: Any = StreamTap(model)
    generator = BatchGenerator(
        tap,
        sampler=sampler,
        completion_batch_size=batch_size,
        prefill_batch_size=batch_size,
    )
    waiting = list(enumerate(prompts))[::-1]
    running: dict[int, tuple[int, Pieces]] = {}
    try:
        while waiting or running:
            # No more than can soon begin: each brings KV caches along.
            while waiting and len(running) < 2 * batch_size:
                number, (text, stops) = waiting.pop()
                answer = Pieces()
                row: Any = RowTap(tap, tokenizer, list(stops), answer, alone=False, goes_on=True)
                ids = tokenizer.encode(text) if isinstance(text, str) else text
                (uid,) = generator.insert([ids], [max_tokens], stop_sequences=[row])
                running[uid] = number, answer
            for response in generator.next_generated():
                if response.finish_reason is None:
                    continue
                number, answer = running.pop(response.uid)
                text = "".join(piece.text for piece in answer.ready)
                if response.finish_reason == "length" and answer.row is not None:
                    text += answer.row.rest()
                yield number, text
    finally:
        generator.close()
