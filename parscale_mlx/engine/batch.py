"""Requests for one number of streams, answered together in a continuous batch."""

from collections import deque
from typing import Any

from parscale_mlx.engine.mlx_lm_parts import NO_PROCESSORS, BatchGenerator
from parscale_mlx.engine.row import LogitsAndWeights, Row
from parscale_mlx.engine.sampling import likeliest
from parscale_mlx.engine.work import Work

PROMPTS_AT_ONCE = 8


class Batch:
    """A continuous batch over a model with P streams.

    Args:
        work: the model and what its requests have in common.
        size: rows at most; more requests wait.
    """

    def __init__(self, work: Work, size: int):
        self.work, self.size = work, size
        self.waiting: deque[Row] = deque()
        self.rows: dict[int, Row] = {}
        # Not a module, and called as one.
        model: Any = work.model if work.streams == 1 else LogitsAndWeights(work.model)
        # One object for all greedy rows: mlx-lm then calls it once for all.
        self.greedy = work.sampler(None) or likeliest
        self.generator = BatchGenerator(
            model,
            sampler=self.greedy,
            completion_batch_size=size,
            prefill_batch_size=min(PROMPTS_AT_ONCE, size),
            prefill_step_size=work.prefill_step,
        )

    def __len__(self) -> int:
        return len(self.waiting) + len(self.rows)

    def add(self, row: Row) -> None:
        self.waiting.append(row)

    def step(self) -> None:
        """Compute a token of every row, and a part of the prompts of new ones."""
        self._drop_interrupted()
        while self.waiting and len(self.rows) < self.size:
            self._begin(self.waiting.popleft())
        if not self.rows:
            return
        _, responses = self.generator.next()
        for response in responses:
            row = self.rows[response.uid]
            row.put(response.token, response.logprobs, self.work.look)
            if row.finished and response.finish_reason is None:
                self._remove(response.uid)
            elif row.finished:
                del self.rows[response.uid]
                self.work.keep(row, response.prompt_cache, response.all_tokens)

    def unfinished(self) -> list[Row]:
        return [*self.waiting, *self.rows.values()]

    def close(self) -> None:
        self.generator.close()

    def _begin(self, row: Row) -> None:
        caches, held = self.work.caches_for(row)
        (uid,) = self.generator.insert(
            [row.prompt[held:]],
            [row.state.max_tokens],
            caches=[caches],
            all_tokens=[row.prompt[:held]],
            samplers=[self.work.sampler(row.request.sampling) or self.greedy],
            logits_processors=[row.processors() or NO_PROCESSORS],
        )
        self.rows[uid] = row

    def _drop_interrupted(self) -> None:
        for uid in [uid for uid, row in self.rows.items() if row.interrupted()]:
            self._remove(uid)
        self.waiting = deque(row for row in self.waiting if not row.interrupted())

    def _remove(self, uid: int) -> None:
        row = self.rows.pop(uid)
        removed = self.generator.remove([uid], return_prompt_caches=self.work.keeps)
        if uid in removed:
            self.work.keep(row, *removed[uid])
