"""Fit the parallel scaling law to measured losses, as arXiv 2505.10475 does in its Section 3.2."""

from itertools import product

import numpy as np
from scipy.optimize import minimize
from threadpoolctl import threadpool_limits

from parscale_core.analysis.law import ScalingLaw
from parscale_core.analysis.loss_table import Losses

DELTA = 1e-3  # of the Huber loss of log L
# Starting points: E as a share of the smallest loss, alpha, k. A follows from the losses' middle.
GRID = ((0.1, 0.3, 0.5, 0.7, 0.9), (0.1, 0.2, 0.5, 1.0, 2.0), (0.1, 0.2, 0.4, 0.8))
STARTS = 16
# log E and the logarithm of the reducible loss at the middle, log alpha, log k.
BOUNDS = ((-20, 5), (-20, 5), (-6, 3), (-12, 5))


def fit(losses: Losses) -> ScalingLaw:
    """The law with the least Huber loss of log L: L-BFGS from the best of a grid of starts.

    Raises:
        ValueError: the table is too small or does not vary enough to tell the parameters apart.
    """
    _check(losses)
    problem = _Problem(losses)
    points = sorted((problem.start(*point) for point in product(*GRID)), key=problem.value)
    with threadpool_limits(1):  # threads only get in the way of matrices this small
        return problem.law(min((problem.descend(p) for p in points[:STARTS]), key=problem.value))


def bootstrap(losses: Losses, law: ScalingLaw, resamples: int, seed: int) -> list[ScalingLaw]:
    """Fits to tables of the same length drawn from this one with replacement, from ``law`` on.

    Draws that no law can be fitted to, for they hold one number of streams or of parameters only,
    are drawn again.
    """
    random = np.random.default_rng(seed)
    laws: list[ScalingLaw] = []
    with threadpool_limits(1):
        while len(laws) < resamples:
            rows = random.integers(len(losses.loss), size=len(losses.loss))
            draw = Losses(
                losses.dataset, losses.parameters[rows], losses.streams[rows], losses.loss[rows]
            )
            if _varies(draw):
                problem = _Problem(draw)
                laws.append(problem.law(problem.descend(problem.vector(law))))
    return laws


def r_squared(losses: Losses, law: ScalingLaw) -> float:
    """The share of the losses' variance that the law explains."""
    residual = losses.loss - law.loss(losses.parameters, losses.streams)
    return float(1 - (residual**2).sum() / ((losses.loss - losses.loss.mean()) ** 2).sum())


class _Problem:
    """The objective over (log E, log t, log alpha, log k), t the reducible loss at N = middle.

    These four hang together less than E, A, alpha and k do, so that L-BFGS takes fewer steps.
    """

    def __init__(self, losses: Losses):
        self.log_loss, self.log_streams = np.log(losses.loss), np.log(losses.streams)
        self.middle = np.exp(np.log(losses.parameters).mean())
        self.log_parameters = np.log(losses.parameters / self.middle)
        self.smallest, self.typical = losses.loss.min(), np.exp(self.log_loss.mean())

    def start(self, share: float, alpha: float, k: float) -> np.ndarray:
        floor = share * self.smallest
        return np.log([floor, self.typical - floor, alpha, k])

    def vector(self, law: ScalingLaw) -> np.ndarray:
        reducible = (law.A / self.middle) ** law.alpha
        return np.log([law.E, reducible, law.alpha, law.k])

    def law(self, vector: np.ndarray) -> ScalingLaw:
        floor, reducible, alpha, k = np.exp(vector).tolist()
        return ScalingLaw(floor, float(self.middle * reducible ** (1 / alpha)), alpha, k)

    def value(self, vector: np.ndarray) -> float:
        return self(vector)[0]

    def descend(self, vector: np.ndarray) -> np.ndarray:
        low, high = np.array(BOUNDS).T
        start = np.clip(vector, low, high)
        return minimize(self, start, jac=True, method="L-BFGS-B", bounds=BOUNDS).x

    def __call__(self, vector: np.ndarray) -> tuple[float, np.ndarray]:
        """The Huber loss, in units of DELTA squared, and its gradient [4]."""
        floor, _, alpha, k = np.exp(vector)
        streams = 1 + k * self.log_streams
        distance = self.log_parameters + np.log(streams)
        reducible = np.exp(np.clip(vector[1] - alpha * distance, None, 50))
        predicted = floor + reducible
        residual = (np.log(predicted) - self.log_loss) / DELTA
        size = np.abs(residual)
        value = np.where(size <= 1, residual**2 / 2, size - 0.5).sum()
        slopes = np.stack([
            np.full_like(predicted, floor),
            reducible,
            -reducible * distance * alpha,
            -reducible * alpha * k * self.log_streams / streams,
        ])  # fmt: skip
        return value, (slopes * np.clip(residual, -1, 1) / predicted).sum(axis=1) / DELTA


def _check(losses: Losses) -> None:
    n = len(losses.loss)
    if n < 5:
        raise ValueError(f"{losses.dataset}: {n} losses; at least 5 are needed to fit four numbers")
    for name in ("parameters", "streams"):
        if len(np.unique(getattr(losses, name))) < 2:
            raise ValueError(
                f"{losses.dataset}: all {name} are the same; the fit needs at least two of them"
            )
    if np.ptp(losses.loss) == 0:
        raise ValueError(f"{losses.dataset}: all losses are the same")


def _varies(losses: Losses) -> bool:
    return all(len(np.unique(a)) > 1 for a in (losses.parameters, losses.streams, losses.loss))
