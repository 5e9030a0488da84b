"""What the engines have in common: requests, pieces of answers, and the state of one request."""

from parscale_core.engine.protocol import Engine, Handle
from parscale_core.engine.request import Logprob, Piece, Request, Sampling

__all__ = ["Engine", "Handle", "Logprob", "Piece", "Request", "Sampling"]
