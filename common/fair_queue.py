"""Whose turn it is: a queue that follows the service counters of tenants. Pure; `fairness.py` says what it promises."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from tandem.common.fairness import Account, AccountKey, ServiceCounters

QUANTUM = 4096.0
"""Service per weight by which a tenant may run ahead where its next prompt is cached better than that of the others."""
LOOK_AHEAD = 4
"""Requests of a tenant that are compared by what is cached of them."""
MAX_OVERTAKEN = 16
"""A request that was passed over so often goes next among those of its tenant."""

T = TypeVar("T")


@dataclass(slots=True)
class _Entry(Generic[T]):
    item: T
    overtaken: int = 0


@dataclass(slots=True)
class _Line(Generic[T]):
    """The waiting requests of one tenant in one band, in order of arrival."""

    account: Account
    entries: deque[_Entry[T]] = field(default_factory=deque)


@dataclass(frozen=True, slots=True)
class _Turn(Generic[T]):
    line: _Line[T]
    index: int
    saved: int
    """Cached tokens of the entry, where somebody looked."""


class FairQueue(Generic[T]):
    """Requests that wait: the lowest band first; in it the tenant with the least counter; of a tenant the oldest.

    Two exceptions keep locality: of a tenant's first `LOOK_AHEAD` requests the one goes that has most cached, and the
    tenant that was chosen last goes on, up to a quantum ahead, while its best request has more cached than that of the
    tenant with the least counter. It always has somebody to choose while anything waits. The owner bounds its length.
    """

    def __init__(
        self, counters: ServiceCounters, cached_tokens: Callable[[T], int] | None = None, quantum: float = QUANTUM
    ) -> None:
        """`cached_tokens`: prompt tokens of a request that need not be computed. None: locality does not matter."""
        self._counters = counters
        self._cached_tokens = cached_tokens
        self._quantum = quantum
        self._bands: dict[int, dict[str, _Line[T]]] = {}
        self._last: AccountKey | None = None
        self._length = 0

    def __len__(self) -> int:
        return self._length

    @property
    def first_band(self) -> int:
        """The band whose turn it is. Raises ValueError where nobody waits."""
        return min(self._bands)

    def push(self, item: T, tenant: str, band: int) -> None:
        """Appends `item` to its tenant's line in `band` (0 is first). Lines take turns; each keeps its order."""
        account = self._counters.enter(tenant, band)
        account.waiting += 1
        lines = self._bands.setdefault(band, {})
        line = lines.get(tenant)
        if line is None:
            line = lines[tenant] = _Line(account)
        line.entries.append(_Entry(item))
        self._length += 1

    def remove(self, item: T, tenant: str, band: int) -> bool:
        """Takes out a request that no longer waits for its turn. False: it is not here."""
        line = self._bands.get(band, {}).get(tenant)
        for index, entry in enumerate(line.entries if line is not None else ()):
            if entry.item is item:
                assert line is not None
                self._take(line, index)
                return True
        return False

    def pop(self, fits: Callable[[T], bool] | None = None, crowded_out: Callable[[T], bool] | None = None) -> T | None:
        """Takes out the one whose turn it is; the caller charges its input now. None: nobody waits, or that one does
        not fit and everybody waits with it (nobody is passed over for being large) but those of other tenants of the
        band that are `crowded_out`."""
        if not self._bands:
            return None
        turn, least = self._choose()
        item = turn.line.entries[turn.index].item
        if fits is not None and not fits(item):
            other = self._crowded_out(turn.line, fits, crowded_out) if crowded_out is not None else None
            if other is None:
                return None
            turn, item = other, other.line.entries[other.index].item
        key = turn.line.account.key
        self._counters.granted(key[0], least)
        self._last = key
        if turn.index:
            turn.line.entries[0].overtaken += 1
        self._take(turn.line, turn.index)
        return item

    def heads(self, band: int) -> Iterator[T]:
        """The oldest request of each tenant that waits in a band."""
        return (line.entries[0].item for line in self._bands.get(band, {}).values())

    def oldest(self, tenant: str, band: int) -> T | None:
        """The first to come of those of a tenant that wait in a band."""
        line = self._bands.get(band, {}).get(tenant)
        return line.entries[0].item if line is not None else None

    def line(self, tenant: str, band: int) -> list[T]:
        """The waiting requests of a tenant in a band, oldest first."""
        line = self._bands.get(band, {}).get(tenant)
        return [entry.item for entry in line.entries] if line is not None else []

    def _choose(self) -> tuple[_Turn[T], float]:
        """The next one, and the least counter of its band."""
        band = min(self._bands)
        lines = self._bands[band]
        first = min(lines.values(), key=_counter)
        least = first.account.counter
        best = self._best(first)
        if self._cached_tokens is not None and self._last is not None and self._last[0] == band:
            last = lines.get(self._last[1])
            if last is not None and last is not first and last.account.counter <= least + self._quantum:
                rival = self._best(last)
                if self._saved(rival) > self._saved(best):
                    return rival, least
        return best, least

    def _crowded_out(
        self, passed: _Line[T], fits: Callable[[T], bool], crowded_out: Callable[[T], bool]
    ) -> _Turn[T] | None:
        """The first that goes although it is the turn of `passed`."""
        lines = self._bands[min(self._bands)].values()
        for line in sorted((line for line in lines if line is not passed), key=_counter):
            turn = self._best(line)
            item = line.entries[turn.index].item
            if crowded_out(item) and fits(item):
                return turn
        return None

    def _best(self, line: _Line[T]) -> _Turn[T]:
        entries = line.entries
        if self._cached_tokens is None or len(entries) == 1 or entries[0].overtaken >= MAX_OVERTAKEN:
            return _Turn(line, 0, -1)
        saved = [self._cached_tokens(entries[index].item) for index in range(min(LOOK_AHEAD, len(entries)))]
        index = saved.index(max(saved))
        return _Turn(line, index, saved[index])

    def _saved(self, turn: _Turn[T]) -> int:
        if turn.saved < 0 and self._cached_tokens is not None:
            return self._cached_tokens(turn.line.entries[turn.index].item)
        return turn.saved

    def _take(self, line: _Line[T], index: int) -> None:
        del line.entries[index]
        line.account.waiting -= 1
        self._length -= 1
        if not line.entries:
            band, tenant = line.account.key
            lines = self._bands[band]
            del lines[tenant]
            if not lines:
                del self._bands[band]


def _counter(line: _Line[T]) -> float:
    return line.account.counter
