"""Times of an engine's steps from what each operator computes and moves: a roofline with few corrections.

Each operator takes the longer of its arithmetic and its memory traffic. A step is the sum of its operators, of the
all-reduces of tensor parallelism and of a constant. `docs/planner.md` has the formulas and what they leave out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

from tandem.common.errors import ConfigError
from tandem.planner.hardware import Hardware
from tandem.planner.model_spec import BYTES, ModelSpec
from tandem.planner.performance import Chunk

_ACTIVATION_BYTES = 2.0
_LINKS: dict[str, float] = {"handover": 5e-3, "host": 1e-3, "disk": 2e-3, "peer": 3e-3, "remote": 5e-3}
"""Latency of each link."""
_DISK_BYTES_PER_S, _REMOTE_BYTES_PER_S = 2e9, 0.3e9
_LOAD_BYTES_PER_S = 1e9
"""Weights from a disk or a registry into a device."""


@dataclass(frozen=True, slots=True)
class Efficiency:
    """What the roofline is corrected by: learned from measured rows (`calibration.py`), within bounds."""

    compute: float = 0.5
    """Share of the peak FLOP/s."""
    memory: float = 0.7
    """Share of the peak bandwidth."""
    link: float = 0.5
    """Share of the peak bandwidth between devices."""
    step_s: float = 2e-3
    """Constant time of a step."""
    layer_s: float = 1e-5
    """Constant time of a layer."""
    reduce_s: float = 1e-5
    """Latency of an all-reduce between two devices; grows with the logarithm of their number."""
    request_s: float = 0.0
    """Time of a step for each request that decodes in it."""

    def __post_init__(self) -> None:
        """Raises ConfigError: the field that is impossible."""
        for field in fields(self):
            value, share = getattr(self, field.name), field.name in ("compute", "memory", "link")
            if not (0 < value <= 1 if share else 0 <= value < 10):
                bounds = "more than 0 and at most 1" if share else "0 or more and less than 10 seconds"
                raise ConfigError(f"efficiency: {field.name}: {value} must be {bounds}")


@dataclass(frozen=True, slots=True)
class Memory:
    """How a device's memory is shared out."""

    usable: float = 0.9
    """Share of it that the engine takes."""
    reserve_bytes: float = 2.0 * 2**30
    """Activations, graphs and communication buffers."""


def efficiency_of(hardware: Hardware) -> Efficiency:
    """The first guess for a device that nobody has measured."""
    return Efficiency(hardware.compute_share, hardware.memory_share, step_s=hardware.step_overhead_s)


class Roofline:
    """One replica: `model` on `devices` of a class, split by tensor parallelism (experts too)."""

    __slots__ = (
        "_eff",
        "_flops",
        "_groups",
        "_hardware",
        "_link_bytes_per_s",
        "_memory",
        "_model",
        "_rate",
        "_reduce_s",
        "devices",
    )

    def __init__(
        self,
        model: ModelSpec,
        hardware: Hardware,
        devices: int = 1,
        efficiency: Efficiency | None = None,
        memory: Memory | None = None,
    ) -> None:
        """Raises ConfigError for a number of devices that the model cannot be split into."""
        if devices < 1 or model.attention.heads % devices:
            raise ConfigError(
                f"devices: {devices} must divide the {model.attention.heads} attention heads of {model.name}"
            )
        self._model, self._hardware, self.devices = model, hardware, devices
        self._eff = efficiency or efficiency_of(hardware)
        self._memory = memory or Memory()
        self._flops = {kind: hardware.flops_for(kind) * self._eff.compute * devices for kind in BYTES}
        self._rate = hardware.bytes_per_s * self._eff.memory * devices
        near = devices <= hardware.devices_per_node
        link = hardware.node_bytes_per_s if near else hardware.network_bytes_per_s
        self._link_bytes_per_s = link * self._eff.link
        self._reduce_s = self._eff.reduce_s * math.log2(devices) if devices > 1 else 0.0
        self._groups = model.window_groups()

    # What the interface asks.

    def step_s(self, chunks: Sequence[Chunk], batch: float, kv_tokens: float) -> float:
        tokens = sum(chunk.tokens for chunk in chunks) + batch
        if tokens <= 0:
            return 0.0
        rows = sum(1.0 for chunk in chunks if chunk.last) + batch
        layers = (
            self._projections_s(tokens)
            + self._mlp_s(tokens)
            + self._attention_s(chunks, batch, kv_tokens)
            + self._model.layers * (self._eff.layer_s + 2.0 * self._all_reduce_s(tokens))
        )
        return layers + self._embedding_s(tokens) + self._head_s(rows) + self._eff.step_s + self._eff.request_s * batch

    def prefill_s(self, uncached_tokens: float, context_tokens: float = 0.0) -> float:
        return self.step_s((Chunk(uncached_tokens, context_tokens),), 0.0, 0.0) if uncached_tokens > 0 else 0.0

    def decode_step_s(self, batch: float, kv_tokens: float) -> float:
        return self.step_s((), batch, kv_tokens)

    def transfer_s(self, link: str, tokens: float) -> float:
        if link not in _LINKS:
            return math.inf
        if tokens <= 0:
            return 0.0
        own = {
            "handover": self._hardware.network_bytes_per_s * self.devices,
            "host": self._hardware.host_bytes_per_s * self.devices,
            "disk": _DISK_BYTES_PER_S,
            "peer": self._hardware.network_bytes_per_s,
            "remote": _REMOTE_BYTES_PER_S,
        }
        return _LINKS[link] + tokens * self._model.kv_bytes_per_token / (own[link] * self._eff.link)

    @property
    def kv_tokens(self) -> float:
        """Where devices outnumber KV heads each head is kept more than once, and so is the latent of MLA."""
        each = self._hardware.memory_bytes * self._memory.usable - self._memory.reserve_bytes
        room = each * self.devices - self._model.weight_bytes
        heads = 1 if self._model.attention.kv_rank else self._model.attention.kv_heads
        copies = max(1.0, self.devices / heads)
        return max(room, 0.0) / (self._model.kv_bytes_per_token * copies)

    @property
    def startup_s(self) -> float:
        return 30.0 + self._model.weight_bytes / (_LOAD_BYTES_PER_S * self.devices)

    # Operators, all layers together.

    def _operator_s(self, flops: float, moved: float, kind: str) -> float:
        return max(flops / self._flops[kind], moved / self._rate)

    def _matrix_s(self, tokens: float, parameters: float, moved_parameters: float, values: float, kind: str) -> float:
        """A product of `tokens` rows: `parameters` count for arithmetic, `moved_parameters` are read once, and each row
        reads and writes `values`."""
        moved = moved_parameters * BYTES[kind] + tokens * values * _ACTIVATION_BYTES
        return self._operator_s(2.0 * tokens * parameters, moved, kind)

    def _projections_s(self, tokens: float) -> float:
        model, a = self._model, self._model.attention
        values = 4.0 * model.hidden + 2.0 * a.heads * (a.value_dim or a.head_dim) + model.kv_values
        parameters = model.attention_parameters
        return model.layers * self._matrix_s(tokens, parameters, parameters, values, model.weights)

    def _mlp_s(self, tokens: float) -> float:
        model = self._model
        parameters = model.mlp_matrices * model.hidden * model.intermediate
        values = 2.0 * model.hidden + 2.0 * model.mlp_matrices * model.intermediate
        total = model.dense_mlp_layers * self._matrix_s(tokens, parameters, parameters, values, model.weights)
        if model.experts is None:
            return total
        e = model.experts
        touched = e.count * (1.0 - (1.0 - e.active / e.count) ** tokens)
        values = e.active * (2.0 * model.hidden + 6.0 * e.intermediate) + 2.0 * model.hidden
        read, computed = model.expert_parameters(touched), model.expert_parameters(e.active)
        return total + e.layers * self._matrix_s(tokens, computed, read, values, model.expert_weights)

    def _attention_s(self, chunks: Sequence[Chunk], batch: float, kv_tokens: float) -> float:
        model, a = self._model, self._model.attention
        per_pair = 2.0 * a.heads * (2.0 * a.kv_rank + a.rope_dim if a.kv_rank else 2.0 * a.head_dim)
        prompt_pair = 2.0 * a.heads * (a.head_dim + a.rope_dim + a.value_dim) if a.kv_rank else per_pair
        value_bytes = model.kv_values * BYTES[model.kv]
        total = 0.0
        for window, layers in self._groups:
            seen = min(kv_tokens, window * batch) if window else kv_tokens
            spent = self._operator_s(seen * per_pair, (seen + batch) * value_bytes, "bfloat16")
            for chunk in chunks:
                pairs, read = _pairs(chunk, window)
                moved = (read + chunk.tokens) * value_bytes + 2.0 * chunk.tokens * a.heads * a.head_dim * 2.0
                spent += self._operator_s(pairs * prompt_pair, moved, "bfloat16")
            total += layers * spent
        return total

    def _embedding_s(self, tokens: float) -> float:
        return 2.0 * tokens * self._model.hidden * _ACTIVATION_BYTES / self._rate

    def _head_s(self, rows: float) -> float:
        parameters = float(self._model.vocab * self._model.hidden)
        return self._matrix_s(rows, parameters, parameters, self._model.vocab, "bfloat16") if rows else 0.0

    def _all_reduce_s(self, tokens: float) -> float:
        """A ring: each device sends 2(n-1)/n of the activations."""
        if self.devices == 1:
            return 0.0
        sent = 2.0 * (self.devices - 1) / self.devices * tokens * self._model.hidden * _ACTIVATION_BYTES
        return self._reduce_s + sent / self._link_bytes_per_s


def _pairs(chunk: Chunk, window: int | None) -> tuple[float, float]:
    """Pairs of a query and a key at or before it, and keys that are read, of a chunk."""
    tokens, context = chunk.tokens, chunk.context
    if not window or context + tokens <= window:
        return tokens * (context + 0.5 * tokens), context + tokens
    short = min(max(window - context, 0.0), tokens)
    return short * (context + 0.5 * short) + (tokens - short) * window, min(context, float(window)) + tokens
