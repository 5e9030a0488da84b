"""The engine protocol on onnxruntime: one thread that moves all requests on in turns."""

import queue
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import psutil
from parscale_core.engine import Answer, Request, check
from parscale_core.engine.tokens import ModelTokens

from parscale_export.runtime.decoder import Decoder
from parscale_export.runtime.model import OnnxModel
from parscale_export.runtime.row import RequestRow
from parscale_export.runtime.scoring import score

STOP = object()


class OnnxEngine:
    """Answers requests with exports of one backbone; see ``parscale_core.engine.Engine``.

    Args:
        model: the export of the default P.
        tokenizer: a transformers tokenizer.
        end_tokens: ids that end a text.
        others: what opens the exports of other P, when they are first asked for.
        gives_stream_weights: whether all of them tell the streams' weights.
        slots: answers of one P that are decoded together at most; more requests wait.
        kept_bytes: memory for KV caches of earlier requests, for each P.
    """

    def __init__(
        self,
        model: OnnxModel,
        tokenizer: Any,
        end_tokens: Collection[int],
        *,
        others: Mapping[int, Callable[[], OnnxModel]] | None = None,
        gives_stream_weights: bool | None = None,
        slots: int = 16,
        kept_bytes: int = 1 << 30,
    ):
        if slots < 1:
            raise ValueError(f"slots {slots}: must be at least 1")
        self.model, self.tokenizer, self.end_tokens = model, tokenizer, frozenset(end_tokens)
        self.vocab_size, self.context_length = model.vocab_size, model.context_length
        self.others = dict(others or {})
        self.streams: Sequence[int] = (model.streams, *self.others)
        if gives_stream_weights is None:
            gives_stream_weights = model.aggregation_weights or model.streams == 1
        self.gives_stream_weights = gives_stream_weights
        # A draft's tokens are judged by the logits of several tokens, in rows of their own.
        self.drafts: Sequence[int | str] = ()
        self._tokens = ModelTokens(self)
        self.name = f"onnxruntime {model.provider}"
        self.failure: Exception | None = None
        self._slots, self._kept_bytes = slots, kept_bytes
        self._models = {model.streams: model}
        self._opening = threading.Lock()
        self._decoders = {model.streams: Decoder(model, slots, kept_bytes)}
        self._rows: list[RequestRow] = []  # all that are not answered yet
        # Requests for exports that are still being opened.
        self._held: dict[int, list[RequestRow]] = {}
        self._inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="parscale engine", daemon=True)
        self._thread.start()

    def submit(self, request: Request) -> Answer:
        """As the protocol; the grammar is read here, on the caller's thread."""
        check(request, self)
        tokens, streams = self._tokens, request.streams or self.streams[0]
        answer = Answer(tokens.state(request))
        row = RequestRow(answer, streams, tokens.matcher(request), tokens.spared)
        with self._lock:
            if self._closed or self.failure is not None:
                why = f"generation failed: {self.failure}" if self.failure else "it is closed"
                raise RuntimeError(f"the engine takes no requests: {why}")
            self._inbox.put(row)
        return answer

    def score(
        self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]], streams: int
    ) -> Iterator[tuple[float, bool]]:
        """As the protocol."""
        return score(self._model(streams), pairs, self._slots, self._kept_bytes)

    def statistics(self) -> Mapping[str, float]:
        """As the protocol."""
        decoders = [*self._decoders.values()]
        waiting = sum(len(d.waiting) for d in decoders) + sum(map(len, [*self._held.values()]))
        memory = psutil.Process().memory_info()
        return {
            "waiting": waiting + self._inbox.qsize(),
            "running": sum(decoder.at_work for decoder in decoders),
            "kept_caches": sum(len(decoder.kept) for decoder in decoders),
            "kept_bytes": sum(decoder.kept.size for decoder in decoders),
            "active_bytes": memory.rss,
        }

    def __enter__(self) -> "OnnxEngine":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """As the protocol."""
        with self._lock:
            self._closed = True
        self._inbox.put(STOP)
        self._thread.join()

    def _run(self) -> None:
        try:
            while self._turn():
                pass
        except Exception as error:
            self.failure = error
        finally:
            self._end_all()

    def _turn(self) -> bool:
        """Take what came, and do a little work for all requests; False at the end."""
        for item in self._arrived():
            if item is STOP:
                return False
            self._begin(item)
        self._rows = [row for row in self._rows if not row.finished]
        for row in self._rows:
            row.interrupt()
        for streams, rows in self._held.items():
            self._held[streams] = [row for row in rows if not row.finished]
        busy = [decoder for decoder in self._decoders.values() if not decoder.idle]
        for decoder in busy:
            decoder.turn(alone=len(busy) == 1)
        return True

    def _arrived(self) -> list[Any]:
        """What is in the inbox; without other work, what comes next."""
        items: list[Any] = []
        idle = all(decoder.idle for decoder in self._decoders.values())
        while True:
            try:
                # Requests that wait for an export to open look at the time now and then.
                pause = 0.1 if any(self._held.values()) else None
                items.append(self._inbox.get(block=idle and not items, timeout=pause))
            except queue.Empty:
                return items

    def _begin(self, item: RequestRow | tuple[int, OnnxModel | Exception]) -> None:
        if isinstance(item, RequestRow):
            self._rows.append(item)
            decoder = self._decoders.get(item.streams)
            if decoder is not None:
                decoder.waiting.append(item)
                return
            if item.streams not in self._held:
                self._held[item.streams] = []
                opening = threading.Thread(target=self._open, args=(item.streams,), daemon=True)
                # While a CUDA graph is recorded, no other thread may use the device.
                (opening.run if self.model.cuda_graph else opening.start)()
            self._held[item.streams].append(item)
            return
        streams, model = item
        rows = self._held.pop(streams)
        if isinstance(model, Exception):
            for row in rows:
                row.fail(RuntimeError(f"streams {streams}: {model}"))
            return
        self._decoders[streams] = Decoder(model, self._slots, self._kept_bytes)
        self._decoders[streams].waiting.extend(rows)

    def _open(self, streams: int) -> None:
        try:
            self._inbox.put((streams, self._model(streams)))
        except Exception as error:
            self._inbox.put((streams, error))

    def _model(self, streams: int) -> OnnxModel:
        with self._opening:
            if streams not in self._models:
                self._models[streams] = self.others[streams]()
            return self._models[streams]

    def _end_all(self) -> None:
        with self._lock:  # what is put into the inbox after this is refused
            self._closed = True
        while not self._inbox.empty():
            if isinstance(item := self._inbox.get(), RequestRow):
                self._rows.append(item)
        for row in self._rows:
            if self.failure is not None and not row.finished:
                row.fail(RuntimeError(f"generation failed: {self.failure}"))
            row.state.cancelled = True
            row.interrupt()
        self._rows = []
        self._decoders.clear()
        self._held.clear()
