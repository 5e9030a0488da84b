"""Requests that no batch can take: drafts, quantised and rotating caches. Each by itself."""

from collections.abc import Generator
from typing import Any

from parscale_mlx.engine.mlx_lm_parts import (
    generate_step,
    generation_stream,
    maybe_quantize_kv_cache,
    speculative_generate_step,
)
from parscale_mlx.engine.ngram import ngram_generate_step
from parscale_mlx.engine.row import LogitsAndWeights, Row
from parscale_mlx.engine.work import Work
from parscale_mlx.model import Model

import mlx.core as mx


class Solo:
    """A request that is answered by itself, a step at a time.

    Args:
        draft: the model that drafts, if one does.
    """

    def __init__(self, work: Work, row: Row, draft: Model | None):
        self.work, self.row, self.draft = work, row, draft
        self.model: Any = work.model if work.streams == 1 else LogitsAndWeights(work.model)
        self.tokens: Generator[tuple[Any, ...], None, None] | None = None
        self.caches, self.held = work.caches_for(row)
        count = len(work.model.layers)
        if draft is not None and len(self.caches) == count:
            self.caches = self.caches + draft.make_cache()
        self.own, self.drafts = self.caches[:count], self.caches[count:]
        # A cache may hold a prefix, and those of a batch do not tell how much.
        self.prefixes = [cache.offset - self.held for cache in self.caches]

    def step(self) -> None:
        """Compute the next token, or a part of the prompt."""
        row = self.row
        if row.interrupted():
            self._end()
            return
        if self.tokens is None:
            if self._prefill():
                return
            self.tokens = self._generate()
        token, logprobs, *drafted = next(self.tokens)
        row.put(token, logprobs, self.work.look, drafted=bool(drafted and drafted[0]))
        if row.finished:
            self._end()

    def unfinished(self) -> list[Row]:
        return [self.row]

    def close(self) -> None:
        if self.tokens is not None:
            self.tokens.close()

    def _prefill(self) -> bool:
        """Compute a part of the prompt, but for its last token; False if there is none left."""
        part = self.row.prompt[self.held : -1][: self.work.prefill_step]
        if not part:
            return False
        with mx.stream(generation_stream):
            for model, caches in ((self.work.model, self.own), (self.draft, self.drafts)):
                if model is None:
                    continue
                model(mx.array([part]), cache=caches)
                options = self.work.cache
                maybe_quantize_kv_cache(
                    caches, options.quantized_start, options.group_size, options.bits
                )
                mx.eval([cache.state for cache in caches])
        mx.clear_cache()
        self.held += len(part)
        # Quantised ones are other objects.
        self.caches = self.own + self.drafts
        return True

    def _generate(self) -> Generator[tuple[Any, ...], None, None]:
        row, request = self.row, self.row.request
        prompt = mx.array(row.prompt[-1:], mx.uint32)
        if len(row.prompt) > 1:
            row.before = mx.array(row.prompt[:-1], mx.uint32)
        options: dict[str, Any] = {
            "max_tokens": row.state.max_tokens,
            "sampler": self.work.sampler(request.sampling) or self.work.sampler(None),
            "logits_processors": row.processors(),
            "prompt_cache": self.caches,
            **self.work.cache.quantize(),
        }
        if request.draft is None:
            return generate_step(prompt, self.model, **options)
        options["num_draft_tokens"] = request.num_draft_tokens
        if self.draft is None:
            return ngram_generate_step(prompt, self.model, row.prompt, **options)
        return speculative_generate_step(prompt, self.model, self.draft, **options)

    def _end(self) -> None:
        self.close()
        if self.tokens is not None and not self.work.keeps:
            return
        tokens = self.row.prompt + self.row.state.tokens
        held = [c.offset - n for c, n in zip(self.caches, self.prefixes, strict=True)]
        for cache, n in zip(self.caches, held, strict=True):
            if n > min(held):
                cache.trim(n - min(held))
        if min(held) <= len(tokens):
            self.work.keep(self.row, self.caches, tokens[: min(held)])
