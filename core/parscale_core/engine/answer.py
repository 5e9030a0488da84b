"""An answer on its way from the engine's thread to the thread that asked."""

import queue
import threading
from collections.abc import Callable, Iterator

from parscale_core.engine.request import Piece
from parscale_core.engine.state import RequestState


class Answer:
    """The ``Handle`` of a request: the engine's thread puts pieces in, another takes them out.

    Args:
        on_cancel: what ``cancel`` does, if not to set ``state.cancelled``.

    Attributes:
        is_dropped: nobody will ever take the pieces out.
    """

    def __init__(self, state: RequestState, on_cancel: Callable[[], object] | None = None):
        self.state = state
        self.is_dropped = False
        self._on_cancel = on_cancel
        self._pieces: queue.SimpleQueue[Piece | Exception] = queue.SimpleQueue()
        self._take: Callable[[Piece | Exception], object] = self._pieces.put
        self._taking = threading.Lock()

    def put(self, piece: Piece) -> None:
        if not self.is_dropped:
            with self._taking:
                self._take(piece)

    def fail(self, error: Exception) -> None:
        """End the answer with an error, raised where its pieces are taken out."""
        with self._taking:
            self._take(error)

    def listen(self, take: Callable[[Piece | Exception], object]) -> None:
        """As the protocol."""
        with self._taking:
            while not self._pieces.empty():
                take(self._pieces.get())
            self._take = take

    def __iter__(self) -> Iterator[Piece]:
        finished = False
        try:
            while not finished:
                piece = self._pieces.get()
                if isinstance(piece, Exception):
                    finished = True
                    raise piece
                finished = piece.finish_reason is not None
                yield piece
        finally:
            if not finished:
                # Nobody takes what comes after: a loop was left, or its generator dropped.
                self.cancel()

    def cancel(self) -> None:
        if self._on_cancel is not None:
            self._on_cancel()
        else:
            self.state.cancelled = True
