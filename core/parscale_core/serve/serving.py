"""What a server's requests have in common."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from parscale_core.engine import Engine
from parscale_core.error_text import one_line
from parscale_core.serve.api_errors import RequestFailed
from parscale_core.serve.metrics import Metrics
from parscale_core.serve.model_names import ModelNames
from parscale_core.serve.settings import Settings
from parscale_core.serve.vocabulary import Vocabulary

LOG = logging.getLogger("parscale.serve")
PATIENCE = 0.1  # seconds to wait for a place


class Serving:
    """An engine, what it is called and what it is asked.

    Args:
        name: what clients call the model.

    Attributes:
        busy: requests in work.
        turns: those that are being answered.
        stopping: no more requests are taken.
        abandoned: running answers are ended too.
        failure: what ended the engine.
    """

    def __init__(self, engine: Engine, name: str, settings: Settings):
        self.engine, self.settings = engine, settings
        self.names = ModelNames(name, engine.streams, engine.drafts)
        self.metrics = Metrics(engine.statistics)
        self.vocabulary = Vocabulary(engine.tokenizer)
        self.created, self.fingerprint = int(time.time()), f"parscale on {engine.name}"
        self.busy, self.turns = 0, set[Any]()
        self.stopping = self.abandoned = False
        self.failure: Exception | None = None
        # The first call settles what the tokenizer keeps; threads may share it then.
        engine.tokenizer.encode("a")

    def stop(self) -> None:
        """Take no more requests; called again, end the running answers too."""
        self.abandoned = self.stopping
        self.stopping = True

    def fail(self, error: Exception) -> None:
        """The engine has failed: stop."""
        if self.failure is None and not self.stopping:
            LOG.error("generation has failed: %s", one_line(error, most=None))
            self.failure = error
        self.stopping = True

    def health(self) -> tuple[int, str]:
        """An HTTP status, and why."""
        if self.failure is not None:
            return 503, "failed"
        return (503, "stopping") if self.stopping else (200, "ok")

    @asynccontextmanager
    async def place(self) -> AsyncIterator[None]:
        """One of the places for requests in work.

        Raises:
            RequestFailed: all are taken, or the server is stopping.
        """
        # A client whose answer has come may ask again before its place is given back.
        end = time.monotonic() + PATIENCE
        while self.busy >= self.settings.max_concurrent and time.monotonic() < end:
            await asyncio.sleep(PATIENCE / 10)
        if self.stopping:
            raise RequestFailed(503, "the server is stopping")
        if self.busy >= self.settings.max_concurrent:
            raise RequestFailed(429, f"{self.busy} requests are in work; try again later")
        self.busy += 1
        try:
            yield
        finally:
            self.busy -= 1
