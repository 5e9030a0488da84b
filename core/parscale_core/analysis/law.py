"""The parallel scaling law: the loss that N parameters reach with P streams."""

from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class ScalingLaw:
    """L = E + (A / (N (k ln P + 1)))^alpha (arXiv 2505.10475, equation 5).

    Attributes:
        E: the loss, in nats a token, that no model falls below.
        A: the parameters at which a plain model is one nat above E.
        alpha: the exponent.
        k: what streams are worth; 0 for nothing.
    """

    E: float
    A: float
    alpha: float
    k: float

    def equivalent_parameters(self, parameters: Any, streams: Any) -> Any:
        """The parameters that reach the same loss without streams."""
        return parameters * (self.k * np.log(streams) + 1)

    def loss(self, parameters: Any, streams: Any = 1) -> Any:
        """Nats a token, for numbers or arrays of parameters outside the embedding and of P."""
        return self.E + (self.A / self.equivalent_parameters(parameters, streams)) ** self.alpha


# The paper's fits, in the digits of its authors' program; the figures print k rounded.
PAPER = {
    "stack-v2-python": ScalingLaw(E=0.691237, A=1.130616e7, alpha=0.189371, k=0.393463),
    "pile": ScalingLaw(E=1.288766, A=1.973520e8, alpha=0.196333, k=0.334456),
}
