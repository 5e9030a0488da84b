"""The engine protocol on MLX: one thread that steps all batches in turns."""

import queue
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any

from parscale_mlx.engine import kept
from parscale_mlx.engine.batch import Batch
from parscale_mlx.engine.kept import KeptCaches
from parscale_mlx.engine.mlx_lm_parts import generation_stream, unwrapped, wired_limit
from parscale_mlx.engine.row import Row
from parscale_mlx.engine.sampling import random_seed
from parscale_mlx.engine.scoring import score
from parscale_mlx.engine.sharing import Sharing
from parscale_mlx.engine.solo import Solo
from parscale_mlx.engine.work import Work
from parscale_mlx.machine import device_name
from parscale_mlx.model import Model
from parscale_mlx.parallel.ranks import check_same
from parscale_mlx.parallel.watch import SETTLE

import mlx.core as mx
from parscale_core.engine import Answer, CacheOptions, Request, check
from parscale_core.engine.defaults import PROMPT_CACHE_BYTES, PROMPT_CACHE_SIZE
from parscale_core.engine.tokens import ModelTokens

STOP = object()


class MlxEngine:
    """Answers requests with models that share a backbone; see ``parscale_core.engine.Engine``.

    Args:
        models: by number of streams, the default first.
        tokenizer: mlx-lm's wrapper, or a transformers tokenizer.
        draft_model: what ``draft="model"`` means.
        batch_size: rows of a batch at most; more requests wait.
        prompt_cache_size, prompt_cache_bytes: KV caches to keep for requests to come.
        cache: how KV caches are held.

    Raises:
        ValueError: the caches' options do not fit each other or the model.
    """

    gives_stream_weights = True

    def __init__(
        self,
        models: Mapping[int, Model],
        tokenizer: Any,
        *,
        draft_model: Model | None = None,
        batch_size: int = 32,
        prompt_cache_size: int = PROMPT_CACHE_SIZE,
        prompt_cache_bytes: int = PROMPT_CACHE_BYTES,
        cache: CacheOptions | None = None,
    ):
        self.models, self.batch_size = dict(models), batch_size
        self._tokens = ModelTokens(self)
        self.tokenizer, self.end_tokens = unwrapped(tokenizer)
        first = next(iter(models.values()))
        for model in {id(m): m for m in (*models.values(), *filter(None, [draft_model]))}.values():
            # What a model computes once and keeps is computed here, not on the engine's thread.
            mx.eval(model.parameters(), model(mx.array([[0]]), cache=model.make_cache()))
        self.vocab_size = first.args.vocab_size
        self.context_length: int | None = first.args.max_position_embeddings
        self.streams: Sequence[int] = tuple(models)
        self.notes: list[str] = []
        self.name = f"MLX on {device_name()}"
        self.draft_model, self.cache = draft_model, cache or CacheOptions()
        _check_cache(self.cache, first, draft_model)
        if self.cache.max_size is not None:
            self.context_length = None
        self.drafts: Sequence[int | str] = self._drafts()
        self._kept = KeptCaches(prompt_cache_size, prompt_cache_bytes)
        self.parallel = first.parallel
        self._sharing = None if first.parallel is None else Sharing(first.parallel.group)
        if self._sharing is not None:
            facts = {
                "streams": self.streams,
                "batch size": batch_size,
                "number of kept prompts": prompt_cache_size,
                "bytes of kept prompts": prompt_cache_bytes,
                "KV cache": self.cache,
            }
            check_same(self._sharing.group, {name: str(value) for name, value in facts.items()})
        self._inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self.failure: Exception | None = None
        self._closed = False
        self._batches: dict[int, Batch] = {}
        self._solos: list[Solo] = []
        # Started by the first request: until then the ranks' own threads may exchange things.
        self._thread = threading.Thread(target=self._run, name="parscale engine", daemon=True)

    @property
    def follows(self) -> bool:
        """This is another rank than 0, which computes what rank 0 is asked: see ``follow``."""
        return self._sharing is not None and not self._sharing.leads

    def submit(self, request: Request) -> Answer:
        """As the protocol; the grammar is read here, on the caller's thread."""
        check(request, self)
        if request.draft is not None and request.draft == (request.streams or self.streams[0]):
            raise ValueError(f"draft {request.draft}: these are the request's own streams")
        if request.sampling.temperature > 0 and request.sampling.seed is None:
            request = replace(request, sampling=replace(request.sampling, seed=random_seed()))
        row = self._row(request)
        self._put(row)
        return row.answer

    def score(
        self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]], streams: int
    ) -> Iterator[tuple[float, bool]]:
        """As the protocol."""
        return score(self.models[streams], pairs)

    def statistics(self) -> Mapping[str, float]:
        """As the protocol."""
        batches = [*self._batches.values()]
        waiting = sum(len(batch.waiting) for batch in batches) + self._inbox.qsize()
        running = sum(len(batch.rows) for batch in batches) + len(self._solos)
        return {
            "waiting": waiting,
            "running": running,
            "kept_caches": len(self._kept),
            "kept_bytes": self._kept.nbytes,
            "active_bytes": mx.get_active_memory(),
            "peak_bytes": mx.get_peak_memory(),
        }

    def close(self) -> None:
        """As the protocol."""
        with self._lock:
            if self._closed:
                return
            # Of ranks, all end after the same step: rank 0 says when.
            if self._sharing is not None or self._thread.is_alive():
                self._start()
            self._closed = True
        self._inbox.put(STOP)
        if self._thread.ident is not None:
            self._thread.join()

    def follow(self) -> None:
        """On another rank than 0, compute what rank 0 is asked, until it closes its engine.

        Raises:
            RuntimeError: the engine failed.
        """
        # A terminal sends it to all ranks; rank 0 decides what it means.
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        self._start()
        self._thread.join()
        if self.failure is not None:
            raise RuntimeError(self._why_not()) from self.failure

    def __enter__(self) -> "MlxEngine":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        # After an error the other ranks may be gone, or hear of it otherwise.
        if error is None or self._sharing is None:
            self.close()

    def read_prompt_cache(self, file: Path) -> None:
        """Take a KV cache for the default model from a file, for requests to come.

        Raises:
            ValueError: it is not one, or was made with another model.
        """
        caches, tokens = kept.load(file, self.models[self.streams[0]])
        self._on_thread(lambda: self._kept.keep((self.streams[0], None), caches, tokens))

    def write_prompt_cache(self, file: Path) -> None:
        """Write the KV cache of the latest answer to a file.

        Raises:
            OSError: the file cannot be written.
        """

        def write() -> None:
            if self._kept.latest is not None:
                kept.save(file, self.models[self.streams[0]], *self._kept.latest)

        self._on_thread(write)

    def _drafts(self) -> Sequence[int | str]:
        if self.cache.max_size is not None:
            return ()
        several = self.streams if len(self.streams) > 1 else ()
        return (*several, "ngram", *(["model"] if self.draft_model is not None else []))

    def _put(self, item: Any) -> None:
        with self._lock:
            if self._closed or self.failure is not None:
                raise RuntimeError(self._why_not())
            self._start()
            self._inbox.put(item)

    def _start(self) -> None:
        if self._thread.ident is None:
            self._thread.start()

    def _why_not(self) -> str:
        return f"generation failed: {self.failure}" if self.failure else "the engine is closed"

    def _on_thread(self, act: Callable[[], None]) -> None:
        done: queue.SimpleQueue[Exception | None] = queue.SimpleQueue()

        def run() -> None:
            try:
                act()
                done.put(None)
            except Exception as error:
                done.put(error)

        self._put(run)
        error = done.get()
        if error is not None:
            raise error

    def _row(self, request: Request) -> Row:
        own = request if self._sharing is None else replace(request, deadline=None)

        def cancel() -> None:
            self._end(row, "cancelled")

        row: Row = Row(
            Answer(self._tokens.state(own), None if self._sharing is None else cancel),
            vocab_size=self.vocab_size,
            streams=request.streams or self.streams[0],
            matcher=self._tokens.matcher(request),
        )
        row.deadline = request.deadline
        return row

    @staticmethod
    def _end(row: Row, why: str) -> None:
        """Ask that a request to several ranks ends, between the same two steps on all."""
        row.wish = row.wish or why

    def _run(self) -> None:
        try:
            streams: Any = [generation_stream]
            with wired_limit(self.models[self.streams[0]], streams):
                while self._turn():
                    pass
        except Exception as error:
            self.failure = error
            if self._sharing is not None:
                # Another rank's death reaches this and the watch in either order.
                time.sleep(SETTLE)
        finally:
            self._end_all()
            # MLX asks this of each thread; left to the thread's end, it can abort the process.
            mx.clear_streams()

    def _turn(self) -> bool:
        """Take what came, and compute a step of everything; False at the end."""
        if not (self._take() if self._sharing is None else self._exchange(self._sharing)):
            return False
        for batch in self._batches.values():
            if len(batch):
                batch.step()
        for solo in self._solos:
            solo.step()
        self._solos = [solo for solo in self._solos if not solo.row.finished]
        return True

    @property
    def _busy(self) -> bool:
        return bool(self._solos) or any(map(len, self._batches.values()))

    def _take(self) -> bool:
        for item in self._arrived(wait=None if not self._busy else 0):
            if item is STOP:
                return False
            self._begin(item)
        return True

    def _arrived(self, wait: float | None) -> list[Any]:
        """What is in the inbox; if it is empty, what comes within ``wait`` seconds."""
        items: list[Any] = []
        while True:
            try:
                items.append(self._inbox.get(timeout=0 if items else wait, block=wait != 0))
            except queue.Empty:
                return items

    def _exchange(self, sharing: Sharing) -> bool:
        if not sharing.is_due(self._busy):
            return True
        new: list[Row] = []
        stop = False
        if sharing.leads:
            for item in self._arrived(wait=0 if self._busy else 0.1):
                stop = stop or item is STOP
                if isinstance(item, Row):  # nothing else comes: prompt caches are no rank's
                    new.append(item)
        requests, ended, stop = sharing.exchange([row.request for row in new], stop)
        for row in new if sharing.leads else map(self._row, requests):
            row.answer.is_dropped = not sharing.leads
            sharing.rows.append(row)
            self._begin(row)
        for number, why in ended.items():
            state = sharing.rows[number].state
            state.cancelled, state.timed_out = why == "cancelled", why == "timeout"
        return not stop

    def _begin(self, item: Any) -> None:
        if not isinstance(item, Row):
            item()
            return
        request = item.request
        if request.draft is not None or not self.cache.can_batch:
            draft: Any = request.draft
            model = self.draft_model if draft == "model" else self.models.get(draft)
            self._solos.append(Solo(self._work(item.streams), item, model))
            return
        if item.streams not in self._batches:
            self._batches[item.streams] = Batch(self._work(item.streams), self.batch_size)
        self._batches[item.streams].add(item)

    def _work(self, streams: int) -> Work:
        return Work(
            self.models[streams], streams, self.cache, self._kept, self._tokens.spared, self._look
        )

    @cached_property
    def _look(self) -> mx.Stream:
        return mx.new_stream(mx.cpu)

    def _end_all(self) -> None:
        with self._lock:  # what comes after this is refused
            self._closed = True
        places: list[Batch | Solo] = [*self._batches.values(), *self._solos]
        rows = [row for place in places for row in place.unfinished()]
        for item in self._arrived(wait=0):
            if isinstance(item, Row):
                rows.append(item)
            elif item is not STOP:
                item()
        for row in rows:
            if self.failure is not None:
                row.fail(RuntimeError(self._why_not()))
            else:
                row.state.cancelled = True
                row.interrupted()
        for place in places:
            place.close()
        self._batches, self._solos = {}, []
        self._kept = KeptCaches(0, 0)


def _check_cache(cache: CacheOptions, model: Model, draft: Model | None) -> None:
    if cache.max_size is not None and cache.bits is not None:
        raise ValueError("kv_bits cannot go with max_kv_size: mlx-lm quantises no rotating cache")
    if cache.max_size is not None and draft is not None:
        raise ValueError("max_kv_size cannot go with a draft model, which trims the cache")
    if cache.bits is not None and model.args.head_dim % cache.group_size:
        fitting = [size for size in (32, 64, 128) if model.args.head_dim % size == 0]
        raise ValueError(
            f"kv_group_size {cache.group_size} does not divide the model's head_dim "
            f"{model.args.head_dim}: "
            + (f"{' or '.join(map(str, fitting))} does" if fitting else "kv_bits cannot be used")
        )
