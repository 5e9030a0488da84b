"""mlx-lm's generation thread, given requests that know their limits."""

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from queue import Empty, Queue
from time import monotonic, sleep
from typing import Any

from parscale_mlx.ranks import broadcast
from parscale_mlx.serve.failure import HUNG_UP, PromptError, RequestFailed
from parscale_mlx.serve.models import ServedModels
from parscale_mlx.serve.sharing import from_bytes, same_tokens, to_bytes
from parscale_mlx.taps import Piece, Pieces, RowTap
from parscale_mlx.watch import SETTLE

import mlx.core as mx
from mlx_lm.generate import make_text_state_machine
from mlx_lm.models.cache import LRUPromptCache, trim_prompt_cache
from mlx_lm.server import (
    CompletionRequest,
    GenerationArguments,
    GenerationContext,
    LogitsProcessorArguments,
    Response,
    ResponseGenerator,
    TimeBudget,
)

POLL = 0.5
STOP = b"stop"
# Seconds of generation between two looks at the requests that came, or were given up.
TURN = 0.05
# Of ranks, which must agree on it: steps of the batch instead.
SHARED_TURN = range(8)


@dataclass
class Request(CompletionRequest):
    """What mlx-lm's handler read from a request, and how far to go for it.

    Attributes:
        deadline: on ``time.monotonic``'s clock.
        hung_up: whether the client is gone.
        observe: told of each piece, with the piece as mlx-lm's handler gets it.
    """

    deadline: float = float("inf")
    hung_up: Callable[[], bool] = lambda: False
    observe: Callable[[GenerationContext, Response, Piece], None] = lambda *_: None
    pieces: Pieces = field(default_factory=Pieces)
    cancelled: bool = False

    def check(self) -> None:
        """End the request if nobody waits for it any more.

        Raises:
            RequestFailed: its time is up or its client is gone.
        """
        if monotonic() > self.deadline:
            self.cancelled = True
            raise RequestFailed(504, "the answer took longer than this server allows", "timeout")
        if self.hung_up():
            self.cancelled = True
            raise RequestFailed(HUNG_UP, "the client has hung up")


class PromptCache(LRUPromptCache):
    """mlx-lm's cache of prompts, which always leaves some of the prompt to be fed.

    Without any token mlx-lm has nothing to generate from, and its generation thread ends with an
    error.

    Attributes:
        fed: tokens at the prompt's end that are not taken from the cache.
    """

    fed = 1

    def fetch_nearest_cache(self, model: Any, tokens: list[int]):
        cache, rest = super().fetch_nearest_cache(model, tokens)
        if cache is None or len(rest) >= self.fed:
            return cache, rest
        if self.fed >= len(tokens):
            return None, tokens
        trim_prompt_cache(cache, self.fed - len(rest))
        return cache, tokens[-self.fed :]

    def insert_cache(self, model: Any, tokens: list[int], prompt_cache: list, **options):
        *_, draft = model
        if draft is not None:
            # An answer's last tokens are not all in both models' caches.
            tokens = tokens[: _level(prompt_cache)]
        super().insert_cache(model, tokens, prompt_cache, **options)


class AnswerGenerator(ResponseGenerator):
    """Generates answers on a thread of its own, in one continuous batch a model.

    Where several processes share the model, each has one of these, and the others' do what rank
    0's does: it sends them its requests, and the answers that nobody waits for any more.

    Attributes:
        failure: what ended the thread.
    """

    model_provider: ServedModels

    def __init__(self, models: ServedModels):
        self._alone = False
        self.prompt_cache: PromptCache
        self._taken: Request | None = None
        self._parallel = models.parallel
        self.failure: Exception | None = None
        settings = models.settings
        # Its thread starts here, so what it needs comes first.
        super().__init__(
            models, PromptCache(settings.prompt_cache_size, settings.prompt_cache_bytes)
        )
        self._time_budget: Any = TimeBudget(TURN) if self._parallel is None else SHARED_TURN

    def _run_generate(self):
        try:
            with same_tokens(self._parallel):
                super()._run_generate()
        finally:
            # MLX asks this of each thread; left to the thread's end, it can abort the process.
            mx.clear_streams()

    def _generate(self):
        try:
            super()._generate()
        except Exception as error:
            self.failure = error
            if self._parallel is not None:
                # Another rank's death reaches this and the watch in either order.
                sleep(SETTLE)
            raise

    def stop_and_join(self):
        if self._parallel is None:
            super().stop_and_join()
        else:
            # Every rank has to end after the same step.
            self.requests.put(STOP)
            self.join()

    def _share_request(self, item):
        if self._parallel is None:
            return item
        data = b""
        if item is STOP:
            data = STOP
        elif item is not None:
            answer, request, args = item
            # A copy, which is not cancelled later: the other ranks would not know.
            request = replace(request)
            data = to_bytes(request, args, cancelled=request.cancelled)
        received = broadcast(self._parallel.group, data)
        if received in (b"", STOP):
            self._stop = received == STOP
            return None
        if data:
            return answer, request, args
        fields, args = from_bytes(received)
        return Queue(), Request(**fields), args

    def _share_object(self, numbers):
        """Rank 0's list of numbers."""
        if self._parallel is None:
            return numbers
        data = json.dumps(numbers).encode() if numbers else b""
        return json.loads(broadcast(self._parallel.group, data) or "[]")

    def generate(  # type: ignore[override]  # our handler's requests are all of our kind
        self, request: Request, generation_args: GenerationArguments, progress_callback=None
    ) -> tuple[GenerationContext, Iterator[Response]]:
        """Have a request answered.

        Returns:
            What mlx-lm's handler reads about the answer, and its pieces as they come.

        Raises:
            RequestFailed: it cannot be answered, or nobody waits for it any more; so may the
                iterator.
        """
        answer: Queue = Queue()
        self.requests.put((answer, request, generation_args))
        items = self._receive(answer, request)
        context = next(items)
        return context, self._read(context, items, request, progress_callback)

    def _receive(self, answer: Queue, request: Request) -> Iterator[Any]:
        while True:
            request.check()
            try:
                item = answer.get(timeout=POLL)
            except Empty:
                if not self.generation_available():
                    raise RequestFailed(503, "the server's generation has failed") from None
                continue
            if item is None:
                return
            if isinstance(item, PromptError):
                raise RequestFailed(400, str(item), item.code)
            if isinstance(item, Exception):
                raise RequestFailed(500, f"generation failed: {type(item).__name__}")
            yield item

    def _read(
        self, context: GenerationContext, items: Iterator[Any], request: Request, progress
    ) -> Iterator[Response]:
        for item in items:
            if isinstance(item, tuple):
                progress(*item)
                continue
            piece = request.pieces.ready.popleft()
            if item.finish_reason == "length" and request.pieces.row is not None:
                piece.text += request.pieces.row.rest()
            request.observe(context, item, piece)
            # mlx-lm's handler drops the text that comes with "stop", and takes an answer that just
            # ends for one that was stopped.
            stopped = item.finish_reason == "stop"
            yield replace(
                item, text=piece.text, finish_reason=None if stopped else item.finish_reason
            )
            if stopped:
                return

    def _tokenize(self, tokenizer, request: Request, args: GenerationArguments):
        self._taken = request
        if request.cancelled:
            raise PromptError("nobody waits for this answer")
        if isinstance(request.prompt, list):
            tokens: Any = (request.prompt, [request.prompt], ["assistant"], "normal", None)
        else:
            try:
                tokens = super()._tokenize(tokenizer, request, args)
            except Exception as error:
                reason = " ".join(str(error).split())[:300]
                raise PromptError(f"the prompt cannot be made into tokens: {reason}") from error
        length, context = len(tokens[0]), self.model_provider.context
        if not length:
            raise PromptError("the prompt is empty")
        if length >= context:
            raise PromptError(
                f"the prompt has {length} tokens; with the answer, this model takes {context}",
                "context_length_exceeded",
            )
        args.max_tokens = min(args.max_tokens, context - length)
        return tokens

    def _make_state_machine(self, model_key, tokenizer, stop_words):
        # Always called right after _tokenize, for the same request. Stop strings are looked for in
        # the text: tokens would miss one that is spelled with others than by itself.
        assert self._taken is not None
        row = RowTap(
            self.model_provider.model,
            tokenizer,
            stop_words,
            self._taken.pieces,
            alone=self._alone,
            goes_on=self._taken.request_type == "text",
        )
        return row, make_text_state_machine(tokenizer)

    def _is_batchable(self, args):
        # mlx-lm looks at the model that was used last.
        return args.model.draft is None and super()._is_batchable(args)

    def _serve_single(self, request, stream):
        self._alone, tap, args = True, self.model_provider.model, request[2]
        tap.drafted = args.num_draft_tokens if args.model.draft is not None else 0
        # Here, unlike in a batch, mlx-lm's penalties know of no token but those that are fed.
        self.prompt_cache.fed = _looks_back(args.logits)
        try:
            super()._serve_single(request, stream)
        finally:
            self._alone, self.prompt_cache.fed, tap.drafted = False, 1, 0


def _level(caches: list) -> int:
    """Trim caches, some of which hold a prefix, to equally many tokens; returns how many."""
    held = [cache.offset - getattr(cache, "prefix_length", 0) for cache in caches]
    for cache, tokens in zip(caches, held, strict=True):
        cache.trim(tokens - min(held))
    return min(held)


def _looks_back(logits: LogitsProcessorArguments) -> int:
    """How many of the latest tokens decide on the next one's penalties, besides the model."""
    penalties = [
        (logits.repetition_penalty, logits.repetition_context_size),
        (logits.presence_penalty, logits.presence_context_size),
        (logits.frequency_penalty, logits.frequency_context_size),
    ]
    # To mlx-lm a size of 0 is all of them.
    return max([1, *(size or sys.maxsize for penalty, size in penalties if penalty)])
