"""What a class of hardware can do, from its data sheet: the performance model's first guess, before any measurement.

Names are slugs of what the driver calls the device, such as `nvidia-h100-80gb-hbm3`. An unknown class gets figures of a
small accelerator: a guess that is too slow is corrected by the first few requests and keeps a new worker from a rush.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Hardware:
    """Peak rates of one device, and the shares of them that are reached."""

    flops: float
    """Dense half-precision FLOP/s; single precision on a CPU."""
    bytes_per_s: float
    """Bandwidth of device memory."""
    step_overhead_s: float = 0.002
    """Fixed time of one engine step: scheduling, launches, sampling."""
    compute_share: float = 0.5
    """Share of `flops` that a long prefill reaches."""
    memory_share: float = 0.7
    """Share of `bytes_per_s` that decoding reaches."""


_CLASSES: dict[str, Hardware] = {
    "nvidia-b300": Hardware(2500e12, 8.0e12),
    "nvidia-b200": Hardware(2250e12, 8.0e12),
    "nvidia-gb300": Hardware(2500e12, 8.0e12),
    "nvidia-gb200": Hardware(2500e12, 8.0e12),
    "nvidia-gh200": Hardware(989e12, 4.0e12),
    "nvidia-h200": Hardware(989e12, 4.8e12),
    "nvidia-h100-pcie": Hardware(756e12, 2.0e12),
    "nvidia-h100-nvl": Hardware(835e12, 3.9e12),
    "nvidia-h100": Hardware(989e12, 3.35e12),
    "nvidia-h20": Hardware(148e12, 4.0e12),
    "nvidia-a100-sxm4-80gb": Hardware(312e12, 2.0e12),
    "nvidia-a100": Hardware(312e12, 1.55e12),
    "nvidia-a30": Hardware(165e12, 0.93e12),
    "nvidia-a10g": Hardware(70e12, 0.6e12),
    "nvidia-a10": Hardware(125e12, 0.6e12),
    "nvidia-l40s": Hardware(362e12, 0.86e12),
    "nvidia-l40": Hardware(181e12, 0.86e12),
    "nvidia-l4": Hardware(121e12, 0.3e12),
    "nvidia-rtx-6000-ada": Hardware(182e12, 0.96e12),
    "nvidia-geforce-rtx-4090": Hardware(165e12, 1.0e12),
    "tesla-v100": Hardware(112e12, 0.9e12),
    "tesla-t4": Hardware(65e12, 0.3e12),
    "amd-instinct-mi300x": Hardware(1307e12, 5.3e12),
    "cpu": Hardware(100e9, 10e9, step_overhead_s=0.003),
}
UNKNOWN = Hardware(30e12, 0.3e12)


def hardware(name: str) -> Hardware:
    """The longest known class that `name` begins with; `UNKNOWN` where there is none."""
    slug = name.strip().lower().replace(" ", "-").replace("_", "-")
    known = [prefix for prefix in _CLASSES if slug == prefix or slug.startswith(prefix + "-")]
    return _CLASSES[max(known, key=len)] if known else UNKNOWN
