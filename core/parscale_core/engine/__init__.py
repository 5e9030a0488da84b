"""What the engines have in common: requests, pieces of answers, and the state of one request."""

from parscale_core.engine.answer import Answer
from parscale_core.engine.cache_options import CacheOptions
from parscale_core.engine.check import check
from parscale_core.engine.protocol import Engine, Handle
from parscale_core.engine.request import Logprob, Piece, Request, Sampling
from parscale_core.engine.state import RequestState

__all__ = [
    "Answer",
    "CacheOptions",
    "Engine",
    "Handle",
    "Logprob",
    "Piece",
    "Request",
    "RequestState",
    "Sampling",
    "check",
]
