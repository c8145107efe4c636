"""What a class of hardware can do, from its data sheet: the performance model's first guess, before any measurement.

Names are slugs of what the driver calls the device, such as `nvidia-h100-80gb-hbm3`. An unknown class gets figures of a
small accelerator: a guess that is too slow is corrected by the first few requests and keeps a new worker from a rush.
A planner knows what it may buy and refuses unknown classes: `known_hardware`.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields

from tandem.common.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Hardware:
    """Peak rates of one device, the shares of them that are reached, and what it costs. Bytes are per second and
    direction."""

    flops: float
    """Dense half-precision FLOP/s with sums in single precision; single precision on a CPU."""
    bytes_per_s: float
    """Bandwidth of device memory."""
    step_overhead_s: float = 0.002
    """Fixed time of one engine step: scheduling, launches, sampling."""
    compute_share: float = 0.5
    """Share of `flops` that a long prefill reaches."""
    memory_share: float = 0.7
    """Share of `bytes_per_s` that decoding reaches."""
    memory_bytes: float = 24 * 2**30
    flops_8bit: float = 0.0
    """FLOP/s on 8-bit numbers; 0: no faster than half precision."""
    flops_4bit: float = 0.0
    """FLOP/s on 4-bit floating-point numbers; 0: it has none."""
    node_bytes_per_s: float = 32e9
    """Link to the other devices of the host."""
    network_bytes_per_s: float = 25e9
    """Share of the host's network."""
    host_bytes_per_s: float = 32e9
    """Link to the host's memory."""
    devices_per_node: int = 8
    watts: float = 300.0
    price_per_hour: float = 0.0
    """On demand; 0: not said. Any currency."""
    spot_price_per_hour: float = 0.0
    """0: not sold as spot."""

    def __post_init__(self) -> None:
        """Raises ConfigError: the field that is impossible."""
        positive = {"flops", "bytes_per_s", "compute_share", "memory_share", "memory_bytes", "devices_per_node"}
        positive |= {"node_bytes_per_s", "network_bytes_per_s", "host_bytes_per_s"}
        for field in fields(self):
            value = getattr(self, field.name)
            if not 0 <= value < math.inf or (value == 0 and field.name in positive):
                least = "more than 0" if field.name in positive else "0 or more"
                raise ConfigError(f"hardware: {field.name}: {value} must be finite and {least}")

    def flops_for(self, weights: str) -> float:
        """FLOP/s on weights of that type. What a device cannot compute with is turned into half precision first, and
        so are 4-bit integers everywhere."""
        if weights in ("fp8", "int8"):
            return self.flops_8bit or self.flops
        return self.flops_4bit or self.flops if weights == "fp4" else self.flops


_GIB = float(2**30)


def _server(
    half: float,
    memory: float,
    gib: float,
    watts: float,
    links: tuple[float, float, float],
    eight: float = 0.0,
    four: float = 0.0,
) -> Hardware:
    """From TFLOP/s, TB/s, GiB, W and GB/s (node, network, host); how much faster 8-bit and 4-bit numbers are."""
    node, network, host = (rate * 1e9 for rate in links)
    return Hardware(
        half * 1e12,
        memory * 1e12,
        memory_bytes=gib * _GIB,
        flops_8bit=eight * half * 1e12,
        flops_4bit=four * half * 1e12,
        node_bytes_per_s=node,
        network_bytes_per_s=network,
        host_bytes_per_s=host,
        watts=watts,
    )


_PCIE4, _PCIE5 = (32.0, 25.0, 32.0), (64.0, 50.0, 64.0)
_NVLINK3, _NVLINK4, _NVLINK5 = (300.0, 25.0, 32.0), (450.0, 50.0, 64.0), (900.0, 100.0, 128.0)

# An L40S is often given 362 TFLOP/s: that is with sums in half precision, which nobody serves with.
CLASSES: Mapping[str, Hardware] = {
    "nvidia-b300": _server(2250, 7.75, 268.6, 1100, _NVLINK5, 2, 4),
    "nvidia-b200": _server(2250, 7.7, 180, 1000, _NVLINK5, 2, 4),
    "nvidia-gb300": _server(2500, 8.0, 268.6, 1400, _NVLINK5, 2, 4),
    "nvidia-gb200": _server(2500, 8.0, 185, 1200, (900, 900, 64), 2, 4),
    "nvidia-gh200": _server(989, 4.0, 96, 900, (450, 50, 450), 2),
    "nvidia-h200": _server(989, 4.8, 141, 700, _NVLINK4, 2),
    "nvidia-h100-pcie": _server(756, 2.0, 80, 350, _PCIE5, 2),
    "nvidia-h100-nvl": _server(835, 3.9, 94, 400, _PCIE5, 2),
    "nvidia-h100": _server(989, 3.35, 80, 700, _NVLINK4, 2),
    "nvidia-h20": _server(148, 4.0, 96, 400, _NVLINK4, 2),
    "nvidia-a100-sxm4-80gb": _server(312, 2.039, 80, 400, _NVLINK3),
    "nvidia-a100": _server(312, 1.55, 40, 400, _NVLINK3),
    "nvidia-a30": _server(165, 0.93, 24, 165, _PCIE4),
    "nvidia-a10g": _server(70, 0.6, 24, 150, _PCIE4),
    "nvidia-a10": _server(125, 0.6, 24, 150, _PCIE4),
    "nvidia-l40s": _server(181, 0.864, 45, 350, _PCIE4, 2),
    "nvidia-l40": _server(181, 0.864, 45, 300, _PCIE4, 2),
    "nvidia-l4": _server(121, 0.3, 24, 72, _PCIE4, 2),
    "nvidia-rtx-pro-6000": _server(468, 1.79, 95.6, 600, _PCIE5, 2),
    "nvidia-rtx-6000-ada": _server(182, 0.96, 48, 300, _PCIE4, 2),
    "nvidia-geforce-rtx-4090": _server(165, 1.0, 24, 450, _PCIE4, 2),
    "tesla-v100": _server(112, 0.9, 32, 300, (150, 12, 16)),
    "tesla-t4": _server(65, 0.3, 16, 70, (16, 12, 16)),
    "amd-instinct-mi300x": _server(1307, 5.3, 192, 750, (448, 50, 64), 2),
    "cpu": Hardware(100e9, 10e9, step_overhead_s=0.003, memory_bytes=8 * _GIB, watts=100.0),
}
UNKNOWN = Hardware(30e12, 0.3e12)


def hardware(name: str, own: Mapping[str, Hardware] | None = None) -> Hardware:
    """The longest known class that `name` begins with; `UNKNOWN` where there is none. Classes of one's `own` go before
    the built-in ones."""
    slug = _slug(name)
    for classes in (own or {}, CLASSES):
        known = [prefix for prefix in classes if slug == prefix or slug.startswith(prefix + "-")]
        if known:
            return classes[max(known, key=len)]
    return UNKNOWN


def known_hardware(name: str, own: Mapping[str, Hardware] | None = None) -> Hardware:
    """As `hardware`. Raises ConfigError for a class that nobody knows."""
    found = hardware(name, own)
    if found is UNKNOWN:
        names = [*(own or {}), *CLASSES]
        close = difflib.get_close_matches(_slug(name), names, 1, cutoff=0.5)
        hint = f"; did you mean {close[0]}?" if close else f"; one of {', '.join(names)}"
        raise ConfigError(f"hardware class {name[:60]!r} is not known{hint}")
    return found


def _slug(name: str) -> str:
    return name.strip().lower().replace(" ", "-").replace("_", "-")
