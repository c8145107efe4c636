"""What the routers that share a Redis say of themselves, and which of it is believed. Pure.

Every router has a row that it alone writes, whole, at each exchange. So a row that is wrong is right again an interval
later, and nothing in it has to be merged. A row counts once it has changed under our eyes: one that somebody left
there, or made up, never does. Time is our own clock only, whatever that of Redis shows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated

import msgspec

from tandem.common.fairness import AccountKey
from tandem.router.turns.elders import MAX_OLDEST

MAX_ROUTERS = 256
"""Rows looked at."""
MAX_ROW_BYTES = 16 * 1024
MAX_BANDS = 64
"""Priority bands in a row."""
ALIVE_S = 5.0
"""A router whose row has not changed for so long is gone."""
FRESH_S = 1.0
"""Nobody is waited for longer than that after a row's last change."""
FORGET_S = 30.0
"""A row that has not changed for so long is taken out of Redis."""
MAX_SERVICE = 2.0**50
"""Service that no deployment gives: counters stay exact below it."""
MAX_AGE_S = 1e6

_Service = Annotated[float, msgspec.Meta(ge=-MAX_SERVICE, le=MAX_SERVICE)]
_Amount = Annotated[float, msgspec.Meta(ge=0, le=MAX_SERVICE)]
_Age = Annotated[float, msgspec.Meta(ge=0, le=MAX_AGE_S)]
_Count = Annotated[int, msgspec.Meta(ge=0, le=2**53)]


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """What one router says of itself at each exchange."""

    beat: _Count
    """Grows with every exchange."""
    charged: _Amount = 0.0
    """Service that this router has charged since it started, corrections added, too."""
    known: _Amount = 0.0
    """The same of all routers, as far as it has heard: no service counter can be beyond it. 0: it has just come."""
    floors: dict[int, _Service] = {}
    """Floors by priority band: `fairness.ServiceCounters.floor`."""
    least: dict[int, _Service] = {}
    """The least counter, by band, of those who wait, or who were granted last."""
    waiting: frozenset[int] = frozenset()
    """The bands in which somebody waits."""
    oldest: tuple[tuple[int, str, _Age], ...] = ()
    """Band, tenant, and the seconds that its oldest request has waited here."""
    tenants: str = ""
    """Fingerprint of who may come in: routers that share should agree."""


_decoder = msgspec.json.Decoder(Row)


def encode(row: Row) -> bytes:
    return msgspec.json.encode(row)


@dataclass(slots=True)
class _Neighbour:
    row: Row
    changed_at: float
    confirmed: bool = False
    """It has changed since we first saw it."""


class Neighbours:
    """`hear` the rows of an exchange, then ask."""

    def __init__(self, clock: Callable[[], float]) -> None:
        """`clock`: seconds that never go back."""
        self.unreadable = 0
        """Rows so far that were none."""
        self._clock = clock
        self._known: dict[bytes, _Neighbour] = {}
        self._unreadable: list[bytes] = []
        self._before = 0.0
        """Charged by routers that are gone."""
        self._settled = False

    def hear(self, rows: Mapping[bytes, bytes]) -> None:
        """Takes the rows of one exchange, by router. Rows that cannot be read are counted; a router that was silent for
        `ALIVE_S` and has no row is gone."""
        now = self._clock()
        self._unreadable = []
        for name, text in rows.items():
            row = _read(text)
            if row is None:
                self.unreadable += 1
                self._unreadable.append(name)
                continue
            known = self._known.get(name)
            if known is None:
                if len(self._known) < MAX_ROUTERS:
                    self._known[name] = _Neighbour(row, now)
            elif known.row.beat != row.beat:
                known.row, known.changed_at, known.confirmed = row, now, True
        for name in [name for name, it in self._known.items() if name not in rows and now - it.changed_at > ALIVE_S]:
            gone = self._known.pop(name)
            if gone.confirmed:
                self._before += gone.row.charged
        self._learn_what_was_before()

    @property
    def settled(self) -> bool:
        """It is known what was before us."""
        return self._settled or not self._known

    def useless(self) -> list[bytes]:
        """Names of rows that should be taken out of Redis: nobody has written them for long, or they are none."""
        now = self._clock()
        return [*self._unreadable, *(name for name, it in self._known.items() if now - it.changed_at > FORGET_S)]

    @property
    def alive(self) -> int:
        return sum(1 for _ in self._rows(ALIVE_S))

    @property
    def charged(self) -> float:
        """Service charged by all others so far."""
        now = self._clock()
        return self._before + sum(
            it.row.charged for it in self._known.values() if it.confirmed or now - it.changed_at <= ALIVE_S
        )

    def disagreeing(self, tenants: str) -> bool:
        """Whether some router lets in others than `tenants`."""
        return any(row.tenants != tenants for row in self._rows(ALIVE_S))

    def floors(self, own: Mapping[int, float], least: Mapping[int, float]) -> dict[int, float]:
        """The highest floor, by band, that anybody knows, and not lower than the least counter of all."""
        found, lowest = dict(own), dict(least)
        for row in self._rows(FRESH_S):
            for band, floor in row.floors.items():
                found[band] = max(floor, found.get(band, floor))
            for band, counter in row.least.items():
                lowest[band] = min(counter, lowest.get(band, counter))
        for band, counter in lowest.items():
            found[band] = max(counter, found.get(band, 0.0))
        return found

    def waiting(self) -> dict[int, float]:
        """The least counter, by band, of those who wait elsewhere."""
        found: dict[int, float] = {}
        for row in self._rows(FRESH_S):
            for band in row.waiting & row.least.keys():
                found[band] = min(row.least[band], found.get(band, row.least[band]))
        return found

    def oldest(self) -> dict[AccountKey, float]:
        """When the oldest request of each tenant arrived that waits elsewhere, on our clock."""
        found: dict[AccountKey, float] = {}
        now = self._clock()
        for it in self._known.values():
            if it.confirmed and now - it.changed_at <= FRESH_S:
                for band, tenant, age_s in it.row.oldest:
                    arrived = it.changed_at - age_s
                    found[band, tenant] = min(arrived, found.get((band, tenant), arrived))
        return found

    def _rows(self, within_s: float) -> Iterator[Row]:
        now = self._clock()
        return (it.row for it in self._known.values() if it.confirmed and now - it.changed_at <= within_s)

    def _learn_what_was_before(self) -> None:
        """A router that comes later has not heard those who are gone; the others tell it, the most modest is believed.
        Over as soon as one of them is known to live."""
        if not self._settled and self._known:
            known = min((it.row.known for it in self._known.values() if it.row.known), default=0.0)
            self._before = max(0.0, known - sum(it.row.charged for it in self._known.values()))
            self._settled = any(it.confirmed for it in self._known.values())


def _read(text: bytes) -> Row | None:
    try:
        row = _decoder.decode(text)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None
    bands = max(len(row.floors), len(row.least), len(row.waiting))
    return row if bands <= MAX_BANDS and len(row.oldest) <= MAX_OLDEST else None
