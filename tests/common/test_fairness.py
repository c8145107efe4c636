"""Fairness: the stated bound, an obvious reference, locality, idle tenants, replicas that exchange counters."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tandem.common.fair_queue import LOOK_AHEAD, MAX_OVERTAKEN, FairQueue
from tandem.common.fairness import INPUT_COST, OUTPUT_COST, AccountKey, ServiceCounters

TENANTS = {"ann": 1.0, "bob": 1.0, "cat": 4.0, "dan": 0.5}
QUANTUM = 100.0


@dataclass(eq=False)
class Job:
    tenant: str
    estimate: int
    actual: int
    output: int
    cached: int = 0
    produced: int = 0
    corrected: bool = False
    band: int = 0

    def to_come(self) -> float:
        """The most that can still be charged, per weight."""
        more = 0 if self.corrected else max(0, self.actual - self.estimate)
        return (more * INPUT_COST + (self.output - self.produced) * OUTPUT_COST) / TENANTS[self.tenant]

    def to_refund(self) -> float:
        return 0.0 if self.corrected else max(0, self.estimate - self.actual) / TENANTS[self.tenant]


class Shop:
    """A queue and the charges after it, with what the bound speaks of measured beside."""

    def __init__(self) -> None:
        self.counters = ServiceCounters()
        self.queue: FairQueue[Job] = FairQueue(self.counters, lambda job: job.cached, QUANTUM)
        self.running: list[Job] = []
        self.waiting: dict[str, int] = defaultdict(int)
        self.service: dict[str, float] = defaultdict(float)
        self.unseen = 0.0
        self.refundable = 0.0
        self.apart = 0.0
        """The largest difference of counters of two tenants with waiting requests."""
        self.apart_since = 0.0
        """The largest difference of service since both have been waiting."""
        self._since: dict[tuple[str, str], tuple[float, float]] = {}

    def arrive(self, job: Job) -> None:
        self.queue.push(job, job.tenant, job.band)
        self.waiting[job.tenant] += 1
        self._look()

    def grant(self) -> None:
        job = self.queue.pop()
        assert (job is None) == (sum(self.waiting.values()) == 0), "not work conserving"
        if job is None:
            return
        self.waiting[job.tenant] -= 1
        self.running.append(job)
        self._measure(extra=(job.tenant, job.estimate * INPUT_COST / TENANTS[job.tenant]))
        self._charge(job, job.estimate * INPUT_COST)

    def produce(self, index: int, tokens: int) -> None:
        if not self.running:
            return
        job = self.running[index % len(self.running)]
        if not job.corrected:
            job.corrected = True
            self._charge(job, (job.actual - job.estimate) * INPUT_COST)
            return
        tokens = min(tokens, job.output - job.produced)
        job.produced += tokens
        if job.produced == job.output:
            self.running.remove(job)
        self._charge(job, tokens * OUTPUT_COST)

    def _charge(self, job: Job, cost: float) -> None:
        self.counters.charge(job.tenant, 0, cost, TENANTS[job.tenant])
        self.service[job.tenant] += cost / TENANTS[job.tenant]
        self._measure()
        self._look()

    def _measure(self, extra: tuple[str, float] = ("", 0.0)) -> None:
        for tenant in TENANTS:
            mine = [job for job in self.running if job.tenant == tenant]
            more = extra[1] if extra[0] == tenant else 0.0
            self.unseen = max(self.unseen, sum(job.to_come() for job in mine) + more)
            self.refundable = max(self.refundable, sum(job.to_refund() for job in mine))

    def _look(self) -> None:
        for pair in itertools.combinations(TENANTS, 2):
            one, other = pair
            if not (self.waiting[one] and self.waiting[other]):
                self._since.pop(pair, None)
                continue
            values = self.counters.values()
            self.apart = max(self.apart, abs(values[0, one] - values[0, other]))
            start = self._since.setdefault(pair, (self.service[one], self.service[other]))
            grown = (self.service[one] - start[0]) - (self.service[other] - start[1])
            self.apart_since = max(self.apart_since, abs(grown))


jobs = st.builds(
    Job,
    tenant=st.sampled_from(sorted(TENANTS)),
    estimate=st.integers(0, 200),
    actual=st.integers(0, 200),
    output=st.integers(1, 60),
    cached=st.integers(0, 50),
)
steps = st.one_of(
    st.tuples(st.just("arrive"), st.lists(jobs, min_size=1, max_size=6)),
    st.tuples(st.just("grant"), st.integers(1, 8)),
    st.tuples(st.just("produce"), st.lists(st.tuples(st.integers(0, 20), st.integers(1, 20)), max_size=10)),
)


@settings(max_examples=100, deadline=None)
@given(st.lists(steps, max_size=80))
def test_two_waiting_tenants_never_differ_by_more_than_the_stated_bound(script: list[tuple[str, object]]) -> None:
    shop = Shop()
    for what, details in script:
        if what == "arrive":
            for job in details:  # type: ignore[attr-defined]
                shop.arrive(job)
        elif what == "grant":
            for _ in range(details):  # type: ignore[call-overload]
                shop.grant()
        else:
            for index, tokens in details:  # type: ignore[attr-defined]
                shop.produce(index, tokens)
    bound = QUANTUM + shop.unseen + shop.refundable
    assert shop.apart <= bound + 1e-6
    assert shop.apart_since <= 2 * bound + 1e-6


def serve(shop: Shop, grants: int) -> None:
    for _ in range(grants):
        shop.grant()
        while shop.running:
            shop.produce(0, 10)


def job(tenant: str, tokens: int = 100, cached: int = 0) -> Job:
    return Job(tenant, tokens, tokens, 1, cached)


def test_service_follows_weights() -> None:
    shop = Shop()
    for _ in range(400):
        for tenant in TENANTS:
            shop.arrive(job(tenant))
    serve(shop, 650)
    served = {tenant: round(shop.service[tenant] * weight) for tenant, weight in TENANTS.items()}
    assert served["cat"] == pytest.approx(4 * served["ann"], rel=0.05)
    assert served["dan"] == pytest.approx(served["bob"] / 2, rel=0.05)


def test_a_rest_earns_nothing() -> None:
    shop = Shop()
    shop.arrive(job("bob"))
    serve(shop, 1)
    for _ in range(1000):
        shop.arrive(job("ann"))
    serve(shop, 900)  # bob rests
    for _ in range(100):
        shop.arrive(job("bob"))
    before = dict(shop.service)
    serve(shop, 100)
    ann, bob = (shop.service[tenant] - before[tenant] for tenant in ("ann", "bob"))
    assert abs(ann - bob) <= 2 * (QUANTUM + 102)


def test_use_of_an_idle_system_costs_nothing_later() -> None:
    shop = Shop()
    for _ in range(500):
        shop.arrive(job("ann"))
        serve(shop, 1)  # alone, never waits
    for _ in range(50):
        shop.arrive(job("bob"))
        shop.arrive(job("ann"))
    before = dict(shop.service)
    serve(shop, 50)
    assert abs((shop.service["ann"] - before["ann"]) - (shop.service["bob"] - before["bob"])) <= 2 * (QUANTUM + 102)


def test_a_rest_earns_nothing_in_a_band_where_others_wait_for_long() -> None:
    """Bands have their own floors: a starved low band does not hold down the floor of the high one."""
    counters = ServiceCounters()
    queue: FairQueue[str] = FairQueue(counters)
    queue.push("batch", "low", 9)
    for number in range(100):
        queue.push(f"a{number}", "ann", 0)
    for _ in range(90):
        assert queue.pop() != "batch"
        counters.charge("ann", 0, 100, 1.0)
    for number in range(10):
        queue.push(f"b{number}", "bob", 0)
    order = []
    for _ in range(20):
        order.append(queue.pop())
        counters.charge("ann" if str(order[-1]).startswith("a") else "bob", 0, 100, 1.0)
    assert sum(str(item).startswith("a") for item in order[:10]) >= 4
    assert queue.pop() == "batch"


def test_bands_are_strict_and_a_tenant_is_served_in_order() -> None:
    queue: FairQueue[int] = FairQueue(ServiceCounters())
    for number, band in enumerate([5, 0, 5, -3, 0]):
        queue.push(number, "ann", band)
    assert [queue.pop() for _ in range(6)] == [3, 1, 4, 0, 2, None]


def test_the_next_one_that_does_not_fit_is_not_passed_over() -> None:
    queue: FairQueue[int] = FairQueue(ServiceCounters())
    queue.push(100, "ann", 0)
    queue.push(1, "bob", 0)
    assert queue.pop(lambda size: size < 50) is None
    assert len(queue) == 2
    assert queue.pop(lambda size: size <= 100) == 100


def test_removed_requests_are_gone_and_their_tenant_rests() -> None:
    counters = ServiceCounters()
    queue: FairQueue[str] = FairQueue(counters)
    queue.push("one", "ann", 0)
    queue.push("two", "ann", 0)
    assert queue.remove("one", "ann", 0)
    assert not queue.remove("one", "ann", 0)
    assert not queue.remove("two", "bob", 0)
    assert queue.pop() == "two"
    assert (len(queue), queue.pop(), counters.account("ann", 0).waiting) == (0, None, 0)


class Reference:
    """The rules of FairQueue, said as slowly as possible: every choice looks at everything."""

    def __init__(self) -> None:
        self.waiting: list[Job] = []
        self.overtaken: dict[int, int] = defaultdict(int)
        self.counters: dict[AccountKey, float] = {}
        self.floors: dict[int, float] = defaultdict(float)
        self.last: AccountKey | None = None
        self.first_seen: dict[AccountKey, int] = {}
        self._numbers = itertools.count()

    def push(self, job: Job) -> None:
        key = job.band, job.tenant
        if not any((other.band, other.tenant) == key for other in self.waiting):
            self.counters[key] = max(self.counters.get(key, 0.0), self.floors[job.band])
            self.first_seen[key] = next(self._numbers)
        self.waiting.append(job)

    def pop(self) -> Job | None:
        if not self.waiting:
            return None
        band = min(job.band for job in self.waiting)
        tenants = {job.tenant for job in self.waiting if job.band == band}
        first = min(tenants, key=lambda tenant: (self.counters[band, tenant], self.first_seen[band, tenant]))
        least = self.counters[band, first]
        chosen = self.best(band, first)
        last = self.last[1] if self.last is not None and self.last[0] == band else ""
        near = last in tenants and last != first and self.counters[band, last] <= least + QUANTUM
        if near and self.best(band, last).cached > chosen.cached:
            chosen = self.best(band, last)
        mine = self.of(band, chosen.tenant)
        if mine[0] is not chosen:
            self.overtaken[id(mine[0])] += 1
        self.waiting.remove(chosen)
        self.floors[band] = max(self.floors[band], least)
        self.last = band, chosen.tenant
        return chosen

    def of(self, band: int, tenant: str) -> list[Job]:
        return [job for job in self.waiting if (job.band, job.tenant) == (band, tenant)]

    def best(self, band: int, tenant: str) -> Job:
        mine = self.of(band, tenant)
        if self.overtaken[id(mine[0])] >= MAX_OVERTAKEN:
            return mine[0]
        return max(mine[:LOOK_AHEAD], key=lambda job: job.cached)

    def charge(self, job: Job, cost: float) -> None:
        self.counters[job.band, job.tenant] += cost / TENANTS[job.tenant]


@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.one_of(
            st.builds(
                Job,
                tenant=st.sampled_from(sorted(TENANTS)),
                estimate=st.integers(0, 64),
                actual=st.integers(-64, 64),
                output=st.just(1),
                cached=st.integers(0, 3),
                band=st.sampled_from([0, 1]),
            ),
            st.none(),
        ),
        max_size=120,
    )
)
def test_it_chooses_as_the_obvious_reference(script: list[Job | None]) -> None:
    """A job arrives; None grants. The charge after a grant may be negative (a correction)."""
    counters = ServiceCounters()
    queue: FairQueue[Job] = FairQueue(counters, lambda job: job.cached, QUANTUM)
    reference = Reference()
    for job in [*script, *[None] * len(script)]:
        if job is not None:
            queue.push(job, job.tenant, job.band)
            reference.push(job)
            continue
        chosen = queue.pop()
        assert chosen is reference.pop()
        if chosen is not None:
            counters.charge(chosen.tenant, chosen.band, chosen.actual, TENANTS[chosen.tenant])
            reference.charge(chosen, chosen.actual)


def test_locality_lets_a_tenant_go_on_until_its_quantum_is_used() -> None:
    """Two tenants, each with its own system prompt: turns change once per quantum and not with every request."""

    def switches(quantum: float) -> int:
        warm = ""
        counters = ServiceCounters()
        queue: FairQueue[str] = FairQueue(counters, lambda tenant: 90 if tenant == warm else 0, quantum)
        order: list[str] = []
        for tenant in ("ann", "bob"):
            for _ in range(60):
                queue.push(tenant, tenant, 0)
        for _ in range(120):
            tenant = queue.pop() or ""
            counters.charge(tenant, 0, 10 if tenant == warm else 100, 1.0)
            warm = tenant
            order.append(tenant)
        return sum(one != other for one, other in itertools.pairwise(order))

    assert switches(0.0) > 60
    assert switches(300.0) < 12


def test_a_request_is_overtaken_a_bounded_number_of_times() -> None:
    queue: FairQueue[int] = FairQueue(ServiceCounters(), lambda number: number)
    for number in range(100):
        queue.push(number, "ann", 0)
    order = [queue.pop() for _ in range(100)]
    assert order.index(0) == MAX_OVERTAKEN
    assert sorted(filter(lambda n: n is not None, order)) == list(range(100))


def test_forgetting_keeps_those_who_wait_and_the_floor() -> None:
    counters = ServiceCounters(max_accounts=16)
    queue: FairQueue[str] = FairQueue(counters)
    for number in range(8):
        queue.push(f"waiting-{number}", f"waiting-{number}", 0)
        counters.charge(f"waiting-{number}", 0, 1000 + number, 1.0)
    for number in range(500):
        counters.enter(f"passing-{number}", number % 3)
        counters.charge(f"passing-{number}", number % 3, 5, 1.0)
        assert len(counters) <= 16
    assert [queue.pop() for _ in range(8)] == [f"waiting-{number}" for number in range(8)]
    assert counters.enter("again", 0).counter == counters.floor(0) == 1007


@pytest.mark.parametrize("most", [1, 3, 9])
def test_accounts_are_bounded_however_few_may_be_kept(most: int) -> None:
    counters = ServiceCounters(max_accounts=most)
    for number in range(20):
        counters.enter(f"passing-{number}", 0)
        assert len(counters) <= most


# Replicas


@dataclass
class Store:
    """What replicas share, as the exchange defines it."""

    totals: dict[AccountKey, float] = field(default_factory=dict)

    def exchange(self, counters: ServiceCounters) -> None:
        changes = counters.take_changes()
        for key, (added, at_least) in changes.accounts.items():
            self.totals[key] = max(self.totals.get(key, 0.0) + added, at_least)
        counters.merge({key: self.totals[key] for key in changes.accounts}, {}, {})


@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.integers(0, 2),
            st.sampled_from(["charge", "lift", "exchange"]),
            st.sampled_from(["ann", "bob"]),
            st.integers(-50, 200),
        ),
        max_size=60,
    )
)
def test_replicas_agree_after_an_exchange_and_count_everything_once(script: list[tuple[int, str, str, int]]) -> None:
    replicas = [ServiceCounters() for _ in range(3)]
    store = Store()
    charged: dict[str, float] = defaultdict(float)
    lifted: dict[str, float] = defaultdict(float)
    for replica, what, tenant, amount in script:
        counters = replicas[replica]
        if what == "charge":
            counters.charge(tenant, 0, amount, 1.0)
            charged[tenant] += amount
        elif what == "lift":
            counters.account(tenant, 0).lift(amount)
            lifted[tenant] = max(lifted[tenant], amount)
        else:
            store.exchange(counters)
    for _ in range(2):
        for counters in replicas:
            for tenant in ("ann", "bob"):
                counters.account(tenant, 0).waiting = 1
            store.exchange(counters)
    values = [counters.values() for counters in replicas]
    assert values[0] == values[1] == values[2]
    for tenant, amount in charged.items():
        if not any(what == "lift" for _, what, _, _ in script) and all(n >= 0 for _, _, _, n in script):
            assert values[0][0, tenant] == amount
        if all(n >= 0 for _, _, _, n in script):
            assert values[0][0, tenant] >= lifted[tenant], "a lift was lost"
        assert values[0][0, tenant] >= amount
        assert values[0][0, tenant] <= lifted[tenant] + sum(
            amount for _, what, name, amount in script if (what, name) == ("charge", tenant) and amount > 0
        )


def test_what_happens_while_an_exchange_is_on_its_way_is_kept() -> None:
    counters, store = ServiceCounters(), Store()
    counters.charge("ann", 0, 10, 1.0)
    changes = counters.take_changes()
    counters.charge("ann", 0, 5, 1.0)
    counters.merge({(0, "ann"): 110.0}, {0: 40.0}, {})
    assert counters.account("ann", 0).counter == 115.0
    store.totals[0, "ann"] = 110.0
    store.exchange(counters)
    assert (changes.accounts[0, "ann"][0], store.totals[0, "ann"]) == (10.0, 115.0)
    assert counters.enter("bob", 0).counter == 40.0


def test_the_least_counter_of_those_who_wait_is_what_a_replica_reports() -> None:
    counters = ServiceCounters()
    queue: FairQueue[str] = FairQueue(counters)
    queue.push("one", "ann", 0)
    counters.charge("ann", 0, 50, 1.0)
    queue.push("two", "bob", 0)
    counters.charge("bob", 0, 70, 1.0)
    counters.charge("cat", 0, 10, 1.0)
    assert counters.take_changes().least == {0: 50.0}
    queue.pop()
    queue.pop()
    assert counters.take_changes().least == {0: 70.0}
    changes = counters.take_changes()
    assert (changes.least, changes.accounts) == ({}, {})
    assert math.isinf(counters.account("ann", 0).at_least)


def test_a_lift_alone_is_told_to_the_others_once() -> None:
    counters = ServiceCounters()
    counters.account("ann", 0)
    counters.take_changes()
    counters.account("ann", 0).lift(30.0)
    assert counters.take_changes().accounts == {(0, "ann"): (0.0, 30.0)}
    assert counters.take_changes().accounts == {}


def test_what_was_taken_and_lost_is_said_again_with_what_came_since() -> None:
    counters = ServiceCounters()
    counters.charge("ann", 0, 5, 1.0)
    counters.charge("bob", 0, 3, 1.0)
    taken = counters.take_changes()
    counters.charge("ann", 0, 2, 1.0)
    counters.charge("cat", 0, 4, 1.0)
    counters.put_back(taken)
    assert counters.take_changes().accounts == {(0, "ann"): (7.0, 7.0), (0, "bob"): (3.0, 3.0), (0, "cat"): (4.0, 4.0)}


def test_totals_that_cannot_be_true_are_counted_and_not_taken() -> None:
    counters = ServiceCounters()
    for tenant in ("ann", "bob", "cat"):
        counters.charge(tenant, 0, 50, 1.0)
    counters.take_changes()
    totals = {(0, "ann"): 60.0, (0, "bob"): 1000.0, (0, "cat"): 10.0}
    assert counters.merge(totals, {0: 20.0, 1: 1000.0}, {}, most=100.0, moved=30.0) == 3
    assert counters.values() == {(0, "ann"): 60.0, (0, "bob"): 50.0, (0, "cat"): 50.0}
    assert counters.floors() == {0: 20.0}
    changes = counters.take_changes()
    assert changes.wrong == {(0, "bob")}, "too low a total is mended by the least value alone"
    assert changes.accounts == {(0, "bob"): (0.0, 50.0), (0, "cat"): (0.0, 50.0)}


def test_a_tenant_is_ahead_of_those_who_wait_at_other_routers() -> None:
    counters = ServiceCounters()
    counters.charge("ann", 1, 50, 1.0)
    assert counters.ahead("ann", 1) == -math.inf, "nobody waits there"
    counters.merge({}, {}, {1: 20.0})
    assert counters.ahead("ann", 1) == 30.0
    assert counters.ahead("ann", 0) == -math.inf, "only a later band waits there"
    assert counters.ahead("ann", 2) == math.inf, "an earlier band waits there"
