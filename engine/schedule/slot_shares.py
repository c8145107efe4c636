"""Whose slots somebody of the same band may take (`common/slot_shares.py`), and how many stay free for them afterwards.
Part of the scheduler: pure, engine thread."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable

from tandem.common.slot_shares import LARGE, kept
from tandem.engine.schedule.sequence import Sequence

KEPT_SHARE = 4
"""One slot in so many, at most, stays free for those who had to take one, or each of their requests would displace"""
KEPT_S = 1.0
"""for so long after the last of them came."""


class SlotShares:
    """Says which running sequences a newcomer may displace, so that no tenant keeps nearly all slots."""

    def __init__(self, max_num_seqs: int) -> None:
        self._large = max_num_seqs / LARGE
        self._most = max(1, max_num_seqs // KEPT_SHARE)
        self._reserved = 0
        self._until = -math.inf

    def is_large(self, slots: int) -> bool:
        """Whether a tenant that has so many may lose some."""
        return slots > self._large

    def victims(self, newcomer: Sequence, running: Iterable[Sequence], live: Iterable[Sequence]) -> list[Sequence]:
        """Those of `running` that it may displace, in their order. `live`: all that have a slot."""
        band, weight = newcomer.priority, newcomer.request.weight
        held = held_by(band, live)
        least = kept(held.pop(newcomer.request.tenant, 0) / weight, weight)
        found: list[Sequence] = []
        for sequence in running if held and self.is_large(max(held.values())) else ():
            slots = held[sequence.request.tenant] if sequence.priority == band else 0
            if self.is_large(slots) and (slots - 1) / sequence.request.weight >= least:
                held[sequence.request.tenant] -= 1
                found.append(sequence)
        return found

    def reserve(self, slots: int, now: float) -> None:
        """Notes that `slots` more were taken from others; 0: somebody with few came in."""
        self._reserved = min(self.reserved(now) + slots, self._most)
        self._until = now + KEPT_S

    def reserved(self, now: float) -> int:
        """Free slots that are not for tenants with many."""
        return self._reserved if now < self._until else 0


def held_by(band: int, live: Iterable[Sequence]) -> Counter[str]:
    """Slots by tenant."""
    return Counter(sequence.request.tenant for sequence in live if sequence.priority == band)
