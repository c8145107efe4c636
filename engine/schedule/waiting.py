"""Requests that wait for blocks, in the order in which they may have them. Part of the scheduler: pure, engine thread.

The lowest priority value first; within it the tenant that got the least service per weight (`common/fairness.py`), and
of a tenant the oldest. Who has begun already (preempted here, or lost by another worker) goes before those who have
not: it holds a client's stream open. With one tenant all this is the order of arrival.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Collection, Iterator

from tandem.common.fairness import INPUT_COST, OUTPUT_COST, ServiceCounters
from tandem.engine.schedule.sequence import Sequence

_Line = list[tuple[int, Sequence]]
"""(arrival, sequence) of one tenant and priority, sorted."""


class WaitingQueue:
    """Lines of waiting sequences, one for each tenant and priority."""

    def __init__(self, counters: ServiceCounters) -> None:
        self._counters = counters
        self._lines: dict[int, dict[str, _Line]] = {}
        """Lines by priority and tenant; none is empty."""

    def __len__(self) -> int:
        return sum(len(line) for tenants in tuple(self._lines.values()) for line in tuple(tenants.values()))

    @property
    def bands(self) -> Collection[int]:
        """The priority values of those who wait."""
        return self._lines.keys()

    @property
    def first_band(self) -> int | None:
        """The lowest priority value; None: nobody waits."""
        return min(self._lines, default=None)

    def sequences(self) -> list[Sequence]:
        """All that wait, in no particular order. From any thread: it copies before it looks."""
        lines = [line for tenants in tuple(self._lines.values()) for line in tuple(tenants.values())]
        return [sequence for line in lines for _, sequence in tuple(line)]

    def add(self, sequence: Sequence) -> None:
        """Queues `sequence` in its tenant's line, at its place by arrival."""
        tenant, weight = sequence.request.tenant, sequence.request.weight
        account = self._counters.enter(tenant, sequence.priority)
        account.waiting += 1
        sequence.account = account
        sequence.output_cost = OUTPUT_COST / weight
        insort(self._lines.setdefault(sequence.priority, {}).setdefault(tenant, []), (sequence.arrival, sequence))

    def remove(self, sequence: Sequence) -> None:
        """Takes `sequence` out of the queue, uncharged. It has to be there."""
        tenant = sequence.request.tenant
        tenants = self._lines[sequence.priority]
        line = tenants[tenant]
        del line[bisect_left(line, sequence.arrival, key=_arrival)]
        if not line:
            del tenants[tenant]
            if not tenants:
                del self._lines[sequence.priority]
        assert sequence.account is not None
        sequence.account.waiting -= 1

    def admit(self, sequence: Sequence, tokens: int) -> None:
        """It leaves the queue with its blocks; `tokens` of its prompt will be computed for it."""
        if not _begun(sequence):
            waiting = self._lines[sequence.priority].values()
            self._counters.granted(sequence.priority, min(_counter(line) for line in waiting))
            if sequence.account is not None:
                sequence.account.charge(tokens * INPUT_COST / sequence.request.weight)
        self.remove(sequence)

    def heads(self, band: int) -> list[Sequence]:
        """The next one of each tenant that waits in `band`, in turn."""
        heads = [(line[0][1], tenant) for tenant, line in self._lines.get(band, {}).items()]
        return [sequence for sequence, _ in sorted(heads, key=_turn)]

    def in_turn(self) -> Iterator[Sequence]:
        """Whose turn it is, then whose it would be next, and so on. Each may be admitted before the next is asked for,
        and others may join later bands; nothing else may change the queue meanwhile."""
        for priority in sorted(self._lines):
            passed: dict[str, int] = {}
            while True:
                tenants = self._lines.get(priority, {})
                heads = [
                    (line[passed.get(tenant, 0)][1], tenant)
                    for tenant, line in tenants.items()
                    if passed.get(tenant, 0) < len(line)
                ]
                if not heads:
                    break
                sequence, tenant = min(heads, key=_turn) if len(heads) > 1 else heads[0]
                index = passed.get(tenant, 0)
                yield sequence
                line = tenants.get(tenant, [])
                if index < len(line) and line[index][1] is sequence:
                    passed[tenant] = index + 1

    def problems(self) -> list[str]:
        """What `check_integrity` has to say."""
        found: list[str] = []
        for priority, tenants in self._lines.items():
            for tenant, line in tenants.items():
                account = self._counters.account(tenant, priority)
                if account.waiting != len(line):
                    found.append(f"{len(line)} requests of {tenant} wait, {account.waiting} are counted")
                if [arrival for arrival, _ in line] != sorted({sequence.arrival for _, sequence in line}):
                    found.append(f"the requests of {tenant} are out of order")
        return found


def _begun(sequence: Sequence) -> bool:
    return sequence.first_scheduled is not None or sequence.num_output > 0


def _turn(head: tuple[Sequence, str]) -> tuple[bool, float, int]:
    sequence = head[0]
    if _begun(sequence) or sequence.account is None:
        return False, 0.0, sequence.arrival
    return True, sequence.account.counter, sequence.arrival


def _counter(line: _Line) -> float:
    account = line[0][1].account
    return account.counter if account is not None else 0.0


def _arrival(entry: tuple[int, Sequence]) -> int:
    return entry[0]
