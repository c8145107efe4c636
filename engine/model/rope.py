"""Rotary position embeddings (RoFormer, Su et al. 2021) with linear, llama3 and YaRN scaling.

The formulas are those of `transformers.modeling_rope_utils`; q and k rotate the first half of a head's dimensions
against the second half.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tandem.common.errors import ConfigError
from tandem.engine.model.config import RopeConfig

PIECE = 256
"""Positions whose rows are computed together, so that a row's bits do not depend on how many there are."""


def inverse_frequencies(rope: RopeConfig, head_dim: int) -> Tensor:
    """float32 [head_dim / 2]: radians per position of each pair of dimensions. Raises ConfigError where the settings
    say of none."""
    try:
        found = _frequencies(rope, head_dim)
    except (ArithmeticError, ValueError) as error:
        raise ConfigError(f"config.json: rope_theta and rope_scaling cannot be used together ({error})") from error
    if not bool(torch.isfinite(found).all()):
        raise ConfigError("config.json: rope_theta and rope_scaling give rotations that are not finite")
    return found


def _frequencies(rope: RopeConfig, head_dim: int) -> Tensor:
    base = rope.theta ** (torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim)
    plain = 1.0 / base
    if rope.kind == "default":
        return plain
    if rope.kind == "linear":
        return plain / rope.factor
    if rope.kind == "llama3":
        return _llama3(rope, plain)
    return _yarn(rope, base, head_dim)


def _llama3(rope: RopeConfig, plain: Tensor) -> Tensor:
    """Low frequencies are divided by the factor, high ones kept, those between interpolated."""
    wavelength = 2 * math.pi / plain
    low = rope.original_max_position_embeddings / rope.low_freq_factor
    high = rope.original_max_position_embeddings / rope.high_freq_factor
    smooth = rope.original_max_position_embeddings / wavelength - rope.low_freq_factor
    smooth = smooth / (rope.high_freq_factor - rope.low_freq_factor)
    between = (1 - smooth) * plain / rope.factor + smooth * plain
    scaled = torch.where(wavelength > low, plain / rope.factor, plain)
    return torch.where((wavelength >= high) & (wavelength <= low), between, scaled)


def _yarn(rope: RopeConfig, base: Tensor, head_dim: int) -> Tensor:
    """NTK by parts (YaRN, Peng et al. 2023, section 3.2)."""

    def dimension(rotations: float) -> float:
        """The (fractional) dimension that turns `rotations` times within the original context."""
        turns = rope.original_max_position_embeddings / (rotations * 2 * math.pi)
        return head_dim * math.log(turns) / (2 * math.log(rope.theta))

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001
    ramp = ((torch.arange(head_dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    return ramp / (rope.factor * base) + (1 - ramp) / base


class RotaryTable:
    """cos and sin of the positions that are in use, looked up once per step."""

    def __init__(self, rope: RopeConfig, head_dim: int, device: torch.device) -> None:
        """Empty: see `reach`. Raises ConfigError where the settings cannot be used."""
        self._frequencies = inverse_frequencies(rope, head_dim)
        self._factor = rope.attention_factor
        self._device = device
        self._cos = self._sin = torch.empty(0, head_dim // 2, device=device)

    def reach(self, positions: int) -> None:
        """Has at least the first `positions` from now on: what a model may be asked for in theory can be more than
        fits into memory."""
        if positions <= self._cos.shape[0]:
            return
        starts = range(0, positions, PIECE)
        angles = [torch.outer(torch.arange(s, s + PIECE, dtype=torch.float32), self._frequencies) for s in starts]
        self._cos = torch.cat([piece.cos() * self._factor for piece in angles]).to(self._device)
        self._sin = torch.cat([piece.sin() * self._factor for piece in angles]).to(self._device)

    def angles(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin, each float32 [N, head_dim / 2], of `positions` int64 [N]."""
        return self._cos.index_select(0, positions), self._sin.index_select(0, positions)

    def at(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The factors that `rotate` takes, for `positions` int64 [N]: [cos, cos] and [-sin, sin], each
        [N, 1, head_dim] of `dtype`."""
        cos, sin = (table.index_select(0, positions) for table in (self._cos, self._sin))
        return torch.cat((cos, cos), dim=-1).unsqueeze(1).to(dtype), torch.cat((-sin, sin), dim=-1).unsqueeze(1).to(
            dtype
        )


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates x [N, heads, head_dim] by the factors of `RotaryTable.at`, in x's dtype."""
    swapped = x.view(*x.shape[:2], 2, -1).flip(2).view(x.shape)
    return torch.addcmul(x * cos, swapped, sin)
