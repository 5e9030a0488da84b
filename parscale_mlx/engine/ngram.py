"""Speculative decoding whose drafts are copied from the text so far: no second model."""

from collections.abc import Callable, Generator, Sequence
from typing import Any

from parscale_mlx.cache import Cache
from parscale_mlx.engine.mlx_lm_parts import (
    generation_stream,
    maybe_quantize_kv_cache,
    trim_prompt_cache,
)

import mlx.core as mx

LONGEST = 4  # tokens to look for at most


class History:
    """A text's tokens, and where each short sequence of them last ended.

    Args:
        tokens: the text so far.
    """

    def __init__(self, tokens: Sequence[int]):
        self.tokens: list[int] = []
        self.ends: dict[tuple[int, ...], int] = {}
        for token in tokens:
            self.add(token)

    def add(self, token: int) -> None:
        # The sequences that end before this token, so that none finds itself.
        for n in range(1, min(LONGEST, len(self.tokens)) + 1):
            self.ends[tuple(self.tokens[-n:])] = len(self.tokens)
        self.tokens.append(token)

    def draft(self, count: int) -> list[int]:
        """Up to ``count`` tokens that followed the text's last ones, where they came before."""
        for n in range(min(LONGEST, len(self.tokens)), 1, -1):
            end = self.ends.get(tuple(self.tokens[-n:]))
            if end is not None:
                return self.tokens[end : end + count]
        return []


def ngram_generate_step(
    prompt: mx.array,
    model: Callable[..., mx.array],
    text: Sequence[int],
    *,
    num_draft_tokens: int,
    max_tokens: int,
    sampler: Callable[[mx.array], mx.array] | None,
    logits_processors: Sequence[Callable[[mx.array, mx.array], mx.array]],
    prompt_cache: list[Cache],
    kv_bits: int | None,
    kv_group_size: int,
    quantized_kv_start: int,
) -> Generator[tuple[int, mx.array, bool], None, None]:
    """Yield tokens as mlx-lm's ``speculative_generate_step`` does, and with its options.

    Args:
        prompt: the text's last token, [1].
        text: all tokens so far, that one included.
        prompt_cache: holds all of them but the last; must be trimmable.

    Yields:
        A token, the log-probabilities it was chosen by, and whether it was drafted.
    """
    history = History(text)
    context, count = prompt, 0
    while count < max_tokens:
        draft = history.draft(min(num_draft_tokens, max_tokens - count - 1))
        with mx.stream(generation_stream):
            inputs = mx.concatenate([context[-1:], mx.array(draft, mx.uint32)])
            logits = model(inputs[None], cache=prompt_cache)[0]
            maybe_quantize_kv_cache(prompt_cache, quantized_kv_start, kv_group_size, kv_bits)
        accepted = 0
        try:
            for n in range(len(draft) + 1):
                with mx.stream(generation_stream):
                    row = logits[n : n + 1]
                    for process in logits_processors:
                        row = process(context, row)
                    logprobs = row - mx.logsumexp(row, axis=-1, keepdims=True)
                    chosen = logprobs.argmax(axis=-1) if sampler is None else sampler(logprobs)
                    context = mx.concatenate([context, chosen.astype(mx.uint32)])
                token: Any = chosen.item()
                history.add(token)
                count += 1
                is_draft = n < len(draft) and token == draft[n]
                accepted += is_draft
                yield token, logprobs[0], is_draft
                if not is_draft or count == max_tokens:
                    break
        finally:
            trim_prompt_cache(prompt_cache, len(draft) - accepted)
