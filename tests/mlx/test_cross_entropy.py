"""Losses beside numpy's in float64, and PyTorch's where it is installed."""

from parscale_mlx.cross_entropy import cross_entropy

import mlx.core as mx
import numpy as np
import pytest


@pytest.fixture(params=[5, 300, 49152, 151936])
def case(request):
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 3, (2, 3, request.param)).astype(np.float32)
    return logits, rng.integers(0, request.param, (2, 3))


def expected(logits, targets):
    x = logits.astype(np.float64)
    x = x - x.max(-1, keepdims=True)
    chosen = np.take_along_axis(x, targets[..., None], -1)[..., 0]
    return np.log(np.exp(x).sum(-1)) - chosen


def test_losses(case):
    logits, targets = case
    losses = np.array(cross_entropy(mx.array(logits), mx.array(targets)))
    assert np.abs(losses - expected(logits, targets)).max() < 5e-6


def test_gradients(case):
    torch = pytest.importorskip("torch")
    logits, targets = case
    weights = np.arange(6, dtype=np.float32).reshape(2, 3)  # one prediction does not count
    theirs = torch.tensor(logits, requires_grad=True)
    loss = torch.nn.functional.cross_entropy(
        theirs.flatten(0, 1), torch.tensor(targets).flatten(), reduction="none"
    )
    (loss * torch.tensor(weights).flatten()).sum().backward()

    def ours(x):
        return (cross_entropy(x, mx.array(targets)) * mx.array(weights)).sum()

    value, gradient = mx.value_and_grad(ours)(mx.array(logits))
    assert value.item() == pytest.approx((loss.detach().numpy() * weights.ravel()).sum(), rel=1e-6)
    assert np.abs(np.array(gradient) - theirs.grad.numpy()).max() < 1e-5


def test_other_types_give_float32(case):
    logits, targets = case
    half = mx.array(logits).astype(mx.bfloat16)
    losses = np.array(cross_entropy(half, mx.array(targets)))
    wanted = expected(np.array(half.astype(mx.float32)), targets)
    assert losses.dtype == np.float32 and np.abs(losses - wanted).max() < 5e-6
    gradient = mx.grad(lambda x: cross_entropy(x, mx.array(targets)).sum())(half)
    assert gradient.dtype == mx.bfloat16
