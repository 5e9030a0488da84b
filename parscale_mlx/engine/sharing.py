"""What the ranks of a shared model tell each other while they answer requests.

Rank 0 decides: which requests come, in which order, and which end early. All ranks hear it between
the same two steps, and so compute the same batches.
"""

import json
import time
from collections.abc import Iterable
from dataclasses import asdict, replace
from typing import Any

from parscale_mlx.engine.row import Row
from parscale_mlx.parallel.ranks import broadcast

import mlx.core as mx
from parscale_core.engine import Request, Sampling

STEPS = 8  # between two exchanges, while there is work
PAUSE = 0.05  # seconds between two exchanges while there is none: who waits in one, spins


class Sharing:
    """The exchanges of one engine.

    Attributes:
        leads: this is rank 0.
        rows: the requests in work, in the same order on all ranks.
    """

    def __init__(self, group: mx.distributed.Group):
        self.group, self.leads = group, group.rank() == 0
        self.rows: list[Row] = []
        self.steps = 0

    def is_due(self, busy: bool) -> bool:
        """Whether the ranks exchange now; the same on all, as they take the same steps."""
        if not busy:
            time.sleep(0 if self.leads else PAUSE)
            self.steps = 0
            return True
        self.steps += 1
        return self.steps % STEPS == 0

    def exchange(
        self, requests: Iterable[Request], stop: bool
    ) -> tuple[list[Request], dict[int, str], bool]:
        """What rank 0 gives, on every rank.

        Args:
            requests: new ones.
            stop: all ranks stop.

        Returns:
            The requests, which of ``rows`` end ("cancelled" or "timeout"), and ``stop``.
        """
        self.rows = [row for row in self.rows if not row.finished]
        ended = {n: why for n, row in enumerate(self.rows) if (why := _ends(row))}
        told = [[to_json(request) for request in requests], list(ended.items()), stop]
        data = json.dumps(told).encode() if any(told) else b""
        received = broadcast(self.group, data)
        if not received:
            return [], {}, False
        texts, pairs, stop = json.loads(received)
        return [from_json(text) for text in texts], dict(pairs), stop


def _ends(row: Row) -> str:
    """Rank 0: why a request must end now, if it must."""
    if row.wish:
        return row.wish
    return "timeout" if row.deadline is not None and time.monotonic() >= row.deadline else ""


def to_json(request: Request) -> dict[str, Any]:
    # Another rank has another clock; rank 0 says when the time is over.
    fields = asdict(replace(request, prompt=list(request.prompt), deadline=None))
    fields["sampling"]["logit_bias"] = list(request.sampling.logit_bias.items())
    return fields


def from_json(fields: dict[str, Any]) -> Request:
    sampling = fields.pop("sampling")
    sampling["logit_bias"] = dict(sampling["logit_bias"])
    fields["stop"] = tuple(fields["stop"])
    return Request(sampling=Sampling(**sampling), **fields)
