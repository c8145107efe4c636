"""When a tenant has so many slots of a worker that another may take some of them. Pure; router and engine agree by it.

A fair queue says who is next. It does not help where one tenant's long answers have every slot for minutes.
"""

from __future__ import annotations

SHARE = 3.0
"""A tenant keeps so many times the slots (per weight) that the one who wants some has."""
LARGE = 8
"""A tenant with fewer than one slot in so many loses none: there is little to gain from many small ones."""


def kept(mine: float, weight: float) -> float:
    """Slots per weight that others keep when a tenant of `weight` comes that has `mine` of them: never fewer than it
    will have."""
    return max(SHARE * mine, mine + 1 / weight)
