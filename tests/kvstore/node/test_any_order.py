"""Any sequence of puts, fetches, pins, lapses, faults and restarts: no lease leaks, and no wrong byte is ever read."""

from __future__ import annotations

import random

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from tandem.kvstore.eviction import DEFAULT_POLICY, Shares
from tandem.kvstore.interfaces import ObjectKey, TierName
from tandem.kvstore.node import KvNode, NodeFetch, Ticket
from tandem.kvstore.node.settings import PUT_LEASE_S, READ_LEASE_S, ZOMBIE_GRACE_S
from tandem.kvstore.node.tickets import TicketState
from tests.kvstore.node.fakes import (
    LAYERS,
    SIZE,
    Clock,
    DictDirectory,
    DictTier,
    DirectPeers,
    bundle_of,
    eventually,
    info_of,
    key_of,
    make_settings,
    put,
    spec_of,
)

KEYS = 14
OWNERS = ("a", "b", "c")
numbers = st.integers(0, KEYS - 1)


def spec(number: int):  # type: ignore[no-untyped-def]
    """An object's owner follows from its key, as its content does."""
    return spec_of(number, owner=OWNERS[number % 3])


CONTENT = {key_of(number): bundle_of(spec(number)) for number in range(KEYS)}


class AnyOrder(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.clock, self.rng = Clock(), random.Random(7)
        self.failing = 0.0
        self.disk = DictTier(
            capacity_bytes=8 * SIZE, fault=lambda operation, key: operation != "info" and self.fault(operation, key)
        )  # a disk tier has its index in memory
        self.remote = DictTier(TierName.REMOTE, capacity_bytes=20 * SIZE, fault=self.fault)
        self.directory, self.peers = DictDirectory(), DirectPeers()
        self.other = KvNode(make_settings(6, node_id="other"), directory=self.directory, peers=self.peers)
        self.other.start()
        assert self.other.wait_indexed(60)
        self.peers.nodes["other"] = self.other
        self.epoch = 0
        self.open()

    def fault(self, operation: str, key: ObjectKey) -> bool:
        if self.rng.random() >= self.failing:
            return False
        if self.rng.random() < 0.3:
            raise OSError("a fault")
        return True

    def open(self) -> None:
        self.epoch += 1
        self.node = KvNode(
            make_settings(6, epoch=self.epoch, quotas=Shares(0.7), loaders=2, eviction=DEFAULT_POLICY),
            tiers=[self.disk, self.remote],
            directory=self.directory,
            peers=self.peers,
            clock=self.clock,
        )
        self.node.start()
        assert self.node.wait_indexed(60)
        self.peers.nodes["a"] = self.node
        self.tickets: list[Ticket] = []
        self.fetches: list[NodeFetch] = []

    @rule(chosen=st.lists(numbers, min_size=1, max_size=8))
    def put(self, chosen: list[int]) -> None:
        for number in chosen:
            put(self.node, spec(number))

    @rule(number=numbers)
    def begin(self, number: int) -> None:
        ticket = self.node.begin_put(key_of(number), info_of(spec(number)))
        if isinstance(ticket, Ticket):
            ticket.buffer[:] = CONTENT[key_of(number)]
            self.tickets.append(ticket)

    @rule(pick=st.integers(0, 9), number=numbers)
    def finish_put_as(self, pick: int, number: int) -> None:
        if self.tickets:
            ticket = self.tickets.pop(pick % len(self.tickets))
            info = info_of(spec(number))
            if info.owner != ticket.item.info.owner:
                with pytest.raises(ValueError, match="something else"):
                    ticket.commit_as(key_of(number), info)
                ticket.abort()
                return
            if ticket.state is not TicketState.DONE:  # else its memory may be another's
                self.node.arena.view(ticket.offset, ticket.size)[:] = CONTENT[key_of(number)]
            ticket.commit_as(key_of(number), info)

    @rule(pick=st.integers(0, 9), commit=st.booleans())
    def finish_put(self, pick: int, commit: bool) -> None:
        if self.tickets:
            ticket = self.tickets.pop(pick % len(self.tickets))
            if commit:
                ticket.commit()
            else:
                ticket.abort()

    @rule(first=numbers, count=st.integers(1, 5), patient=st.booleans())
    def fetch(self, first: int, count: int, patient: bool) -> None:
        keys = [key_of(number % KEYS) for number in range(first, first + count)]
        located = self.node.locate(keys)
        assert [place.key for place in located] == keys[: len(located)]
        fetch = self.node.fetch(located)
        assert [source.key for source in fetch.sources] == keys[: len(fetch.sources)]
        if patient:
            assert fetch.wait(LAYERS, 60) or fetch.failed
        self.fetches.append(fetch)

    @rule(pick=st.integers(0, 9))
    def close_fetch(self, pick: int) -> None:
        if self.fetches:
            fetch = self.fetches.pop(pick % len(self.fetches))
            self.read(fetch)
            fetch.close()
            fetch.close()

    @rule(number=numbers)
    def other_puts(self, number: int) -> None:
        put(self.other, spec(number))

    @rule(number=numbers)
    def other_fetches(self, number: int) -> None:
        with self.other.fetch(self.other.locate([key_of(number)])) as fetch:
            assert fetch.wait(LAYERS, 60) or fetch.failed
            self.read(fetch)

    @rule(number=numbers, hard=st.booleans(), owner=st.sampled_from(OWNERS))
    def pin(self, number: int, hard: bool, owner: str) -> None:
        self.node.commands.pin(key_of(number), owner, 50.0, hard)

    @rule(number=numbers, owner=st.sampled_from(OWNERS))
    def unpin(self, number: int, owner: str) -> None:
        self.node.commands.unpin(key_of(number), owner)

    @rule(seconds=st.sampled_from((1.0, PUT_LEASE_S, READ_LEASE_S + 1, ZOMBIE_GRACE_S, 400.0)))
    def time_passes(self, seconds: float) -> None:
        for fetch in self.fetches:
            self.read(fetch)
        self.clock.now += seconds
        self.node.janitor.reap()

    @rule(number=numbers)
    def quarantine(self, number: int) -> None:
        self.node.quarantine(key_of(number), "test")

    @rule(owner=st.sampled_from((*OWNERS, None)))
    def clear(self, owner: str | None) -> None:
        self.node.commands.clear(owner=owner)

    @rule(number=numbers, tier=st.sampled_from((TierName.HOST, TierName.DISK, TierName.REMOTE)))
    def move(self, number: int, tier: TierName) -> None:
        if self.node.commands.move(key_of(number), tier) and not self.failing:
            assert tier in self.node.lookups.contains(key_of(number))

    @rule(share=st.sampled_from((0.0, 0.0, 0.3, 1.0)))
    def faults(self, share: float) -> None:
        self.failing = share

    @rule()
    def scrub(self) -> None:
        assert self.node.scrub.run(4).bad == ()

    @rule()
    def reopen(self) -> None:
        self.node.close()
        for fetch in self.fetches:
            assert fetch.intact() == 0
            fetch.close()
        for ticket in self.tickets:
            assert not ticket.commit()
        self.open()

    @invariant()
    def books_balance(self) -> None:
        failing, self.failing = self.failing, 0.0  # of tiers that work; the books have to balance whatever was before
        self.node.check_integrity()
        self.other.check_integrity()
        self.failing = failing
        stats = self.node.stats()
        assert self.node.arena.used_bytes <= self.node.arena.capacity_bytes
        assert self.disk.used_bytes <= self.disk.capacity_bytes
        assert stats.tiers[0].hard_pinned_bytes <= self.node.arena.capacity_bytes // 2
        for fetch in self.fetches:
            self.read(fetch)

    def read(self, fetch: NodeFetch) -> None:
        for index in range(fetch.intact()):
            assert bytes(fetch.buffer(index)) == CONTENT[fetch.sources[index].key]

    def teardown(self) -> None:
        self.failing = 0.0
        for ticket in self.tickets:
            ticket.abort()
        for fetch in self.fetches:
            fetch.close()
        assert self.node.flush(60)
        eventually(lambda: self.node.stats().leases == 0)
        self.node.check_integrity()
        told = {(event.key, event.tier): event.size for event in self.node.snapshot()}
        eventually(lambda: self.directory.held["a"] == told)
        self.node.commands.clear()
        assert self.node.arena.used_bytes == 0
        assert self.node.arena.largest_free == self.node.arena.capacity_bytes
        assert self.directory.held["a"] == {}
        self.node.close()
        self.other.close()


def run(max_examples: int, steps: int) -> None:
    run_state_machine_as_test(
        AnyOrder,
        settings=settings(
            max_examples=max_examples,
            stateful_step_count=steps,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )


@pytest.mark.filterwarnings("ignore::hypothesis.errors.HypothesisWarning")
def test_books_and_bytes_hold_in_any_order() -> None:
    run(12, 40)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::hypothesis.errors.HypothesisWarning")
def test_books_and_bytes_hold_in_any_order_at_length() -> None:
    run(150, 80)
