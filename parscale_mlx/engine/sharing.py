"""What the ranks of a shared model tell each other while they answer requests.

Rank 0 decides: which requests come, in which order, and which end early. All ranks hear it between
the same two steps, and so compute the same batches.
"""

import json
import time
from collections.abc import Iterable
from dataclasses import asdict, replace

from parscale_mlx.ranks import broadcast

import mlx.core as mx
from parscale_core.engine import Request, Sampling

STEPS = 8  # between two exchanges, while there is work
PAUSE = 0.05  # seconds between two exchanges while there is none: who waits in one, spins


class Sharing:
    """The exchanges of one engine.

    Attributes:
        leads: this is rank 0.
    """

    def __init__(self, group: mx.distributed.Group):
        self.group, self.leads = group, group.rank() == 0
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
        self, requests: Iterable[Request], ended: dict[int, str], stop: bool
    ) -> tuple[list[Request], dict[int, str], bool]:
        """What rank 0 gives, on every rank.

        Args:
            requests: new ones.
            ended: numbers of requests that end, and whether "cancelled" or "timeout".
            stop: all ranks stop.
        """
        told = [[to_json(request) for request in requests], list(ended.items()), stop]
        data = json.dumps(told).encode() if any(told) else b""
        received = broadcast(self.group, data)
        if not received:
            return [], {}, False
        texts, pairs, stop = json.loads(received)
        return [from_json(text) for text in texts], dict(pairs), stop


def to_json(request: Request) -> dict:
    # Another rank has another clock; rank 0 says when the time is over.
    fields = asdict(replace(request, prompt=list(request.prompt), deadline=None))
    fields["sampling"]["logit_bias"] = list(request.sampling.logit_bias.items())
    return fields


def from_json(fields: dict) -> Request:
    sampling = fields.pop("sampling")
    sampling["logit_bias"] = dict(sampling["logit_bias"])
    fields["stop"] = tuple(fields["stop"])
    return Request(sampling=Sampling(**sampling), **fields)
