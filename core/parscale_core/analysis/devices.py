"""Devices by name: memory bandwidth and floating-point operations a second."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Device:
    """Attributes: bytes a second, and operations a second on 16-bit and on 32-bit numbers."""

    name: str
    bandwidth: float
    flops16: float
    flops32: float

    def flops(self, bits: int) -> float:
        return self.flops32 if bits > 16 else self.flops16


def _nvidia(name: str, gigabytes: float, tensor: float, plain: float) -> Device:
    """From the data sheets: GB/s, TFLOP/s of dense 16-bit tensor cores and of plain float32."""
    return Device(name, gigabytes * 1e9, tensor * 1e12, plain * 1e12)


def _apple(name: str, gigabytes: float, cores: int, gigahertz: float) -> Device:
    """Apple names bandwidth and GPU cores; a core does 128 multiply-adds a cycle in either type."""
    flops = cores * 128 * 2 * gigahertz * 1e9
    return Device(f"Apple {name}, {cores}-core GPU", gigabytes * 1e9, flops, flops)


DEVICES = {
    "a100": _nvidia("NVIDIA A100 80 GB SXM", 2039, 312, 19.5),
    "a100-40gb": _nvidia("NVIDIA A100 40 GB SXM", 1555, 312, 19.5),
    "h100": _nvidia("NVIDIA H100 80 GB SXM", 3350, 989.4, 66.9),
    "h100-pcie": _nvidia("NVIDIA H100 80 GB PCIe", 2039, 756, 51.2),
    "h200": _nvidia("NVIDIA H200 141 GB SXM", 4800, 989.4, 66.9),
    "m1": _apple("M1", 68.3, 8, 1.278),
    "m1-pro": _apple("M1 Pro", 200, 16, 1.296),
    "m1-max": _apple("M1 Max", 400, 32, 1.296),
    "m1-ultra": _apple("M1 Ultra", 800, 64, 1.296),
    "m2": _apple("M2", 100, 10, 1.398),
    "m2-pro": _apple("M2 Pro", 200, 19, 1.398),
    "m2-max": _apple("M2 Max", 400, 38, 1.398),
    "m2-ultra": _apple("M2 Ultra", 800, 76, 1.398),
    "m3": _apple("M3", 100, 10, 1.398),
    "m3-pro": _apple("M3 Pro", 150, 18, 1.398),
    "m3-max": _apple("M3 Max", 400, 40, 1.398),
    "m3-ultra": _apple("M3 Ultra", 819, 80, 1.398),
    "m4": _apple("M4", 120, 10, 1.47),
    "m4-pro": _apple("M4 Pro", 273, 20, 1.578),
    "m4-max": _apple("M4 Max", 546, 40, 1.678),
}
