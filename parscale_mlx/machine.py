"""What this machine can do: memory bandwidth and matrix products, measured on MLX's device."""

import os
import platform
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import mlx.core as mx
import numpy as np

Clock = Callable[[], float]
SECONDS = 0.5  # of each measurement
BANDWIDTH_BYTES = 1 << 28  # beyond every cache
# On a CPU a large product only waits longer; a GPU needs one to fill it.
SIZES = {mx.DeviceType.cpu: 768, mx.DeviceType.gpu: 4096}


def device_name() -> str:
    """MLX's default device, and the processor it is."""
    info = mx.device_info() if hasattr(mx, "device_info") else {}
    name = info.get("device_name") or info.get("architecture") or platform.processor()
    return f"{mx.default_device()} {name}".strip()


def measure_flops(dtype: mx.Dtype, clock: Clock = time.perf_counter) -> float:
    """Floating-point operations a second of square matrix products of this type.

    Args:
        clock: ``time.process_time`` for those of a second of one core.
    """
    size = SIZES[mx.default_device().type]
    if mx.default_device() == mx.cpu and dtype != mx.float32:
        size //= 4  # these kernels are many times slower there
    a = mx.random.normal((size, size)).astype(dtype)
    return 2 * size**3 / _fastest(lambda: mx.eval(a @ a), clock)


def measure_bandwidth(clock: Clock = time.perf_counter) -> float:
    """Bytes a second of reading memory: by the GPU, or by all of the CPU's cores.

    Args:
        clock: ``time.process_time`` for those of a second of one core, all being busy.
    """
    if mx.default_device() == mx.gpu:
        a = mx.random.normal((BANDWIDTH_BYTES // 4,))
        return BANDWIDTH_BYTES / _fastest(lambda: mx.eval(a.max()), clock)
    # MLX reduces on one core of the CPU, which cannot take all that the memory gives.
    threads = os.cpu_count() or 1
    parts = np.array_split(np.random.default_rng(0).random(BANDWIDTH_BYTES // 8), threads)
    with ThreadPoolExecutor(threads) as pool:
        return BANDWIDTH_BYTES / _fastest(lambda: list(pool.map(np.max, parts)), clock)


def _fastest(run: Callable[[], object], clock: Clock) -> float:
    """Seconds of the fastest of the runs that fit into ``SECONDS``, after one that warms up.

    The fastest, for other programs can only slow a run down.
    """
    run()
    fastest, end = float("inf"), time.perf_counter() + SECONDS
    while fastest == float("inf") or time.perf_counter() < end:
        start = clock()
        run()
        fastest = min(fastest, clock() - start)
    return fastest
