"""What has to change so that a router has the workers that it is to have. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass

from tandem.router.fleet.sources import Target


@dataclass(frozen=True, slots=True)
class Changes:
    """Targets in order, each in one of the lists at most."""

    come: tuple[Target, ...] = ()
    """Wanted, and not here yet."""
    leave: tuple[Target, ...] = ()
    """Workers that are here and not wanted any more."""
    stay: tuple[Target, ...] = ()
    """Leaving, and wanted again."""


def reconcile(wanted: Set[Target], present: Mapping[Target, bool]) -> Changes:
    """The changes that lead from `present` to `wanted`. `present`: with whether a worker is leaving already; one that
    is has what runs there, and nothing new."""
    return Changes(
        come=tuple(sorted(wanted - present.keys())),
        leave=tuple(sorted(target for target, leaving in present.items() if target not in wanted and not leaving)),
        stay=tuple(sorted(target for target, leaving in present.items() if target in wanted and leaving)),
    )
