"""Threads that tenants share: an obvious rule for the order, lines of one's own, shares, cancelled work."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import CancelledError, Future

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tandem.common.errors import TandemError
from tandem.common.fair_work import FairWork

TIMEOUT_S = 30.0
WEIGHTS = {"ann": 1.0, "bob": 1.0, "cat": 4.0}


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Gate:
    """Work that waits."""

    def __init__(self) -> None:
        self.entered = threading.Event()
        self.opened = threading.Event()

    def __call__(self) -> None:
        self.entered.set()
        assert self.opened.wait(TIMEOUT_S)

    def wait(self) -> None:
        assert self.entered.wait(TIMEOUT_S)


def obviously_fair(jobs: list[tuple[str, float]], ran: list[tuple[str, float]]) -> bool:
    """All wait from the beginning: each time it must be the oldest of one of those who have got the least so far."""
    got, left = dict.fromkeys(WEIGHTS, 0.0), list(jobs)
    for tenant, took_s in ran:
        least = min(got[waiting] for waiting, _ in left)
        oldest = next(job for job in left if job[0] == tenant)
        if got[tenant] > least + 1e-6 or oldest != (tenant, took_s):
            return False
        left.remove(oldest)
        got[tenant] += took_s / WEIGHTS[tenant]
    return not left


seconds = st.floats(0.01, 10.0)


@given(st.lists(st.tuples(st.sampled_from(list(WEIGHTS)), seconds), max_size=30))
@settings(deadline=None)
def test_whoever_got_the_least_time_is_next(jobs: list[tuple[str, float]]) -> None:
    clock, gate = Clock(), Gate()
    work = FairWork("test", 1, max_waiting=100, clock=clock)
    ran: list[tuple[str, float]] = []

    def job(tenant: str, took_s: float) -> None:
        ran.append((tenant, took_s))
        clock.now += took_s

    blocked = work.submit("nobody", 1.0, gate)
    gate.wait()
    futures = [work.submit(tenant, WEIGHTS[tenant], job, tenant, took_s) for tenant, took_s in jobs]
    gate.opened.set()
    for future in [blocked, *futures]:
        future.result(TIMEOUT_S)
    work.close()
    assert obviously_fair(jobs, ran)


def test_a_newcomer_waits_for_what_runs_and_for_nothing_else() -> None:
    clock, gate = Clock(), Gate()
    work = FairWork("test", 1, max_waiting=100, clock=clock)
    order: list[str] = []

    def job(tenant: str) -> None:
        order.append(tenant)
        clock.now += 1.0

    first = work.submit("hog", 1.0, gate)
    gate.wait()
    hogs = [work.submit("hog", 1.0, job, "hog") for _ in range(90)]
    guest = work.submit("guest", 1.0, job, "guest")
    gate.opened.set()
    for future in [first, *hogs, guest]:
        future.result(TIMEOUT_S)
    work.close()
    assert order.index("guest") <= 1, "at equal counters the older one may go first, once"


def test_the_line_of_one_tenant_is_bounded_and_that_of_another_is_not_full() -> None:
    gate = Gate()
    work = FairWork("test", 1, max_waiting=3, share=1)
    running = work.submit("hog", 1.0, gate)
    gate.wait()
    waiting = [work.submit("hog", 1.0, str) for _ in range(3)]
    with pytest.raises(TandemError) as refused:
        work.submit("hog", 1.0, str)
    assert refused.value.code == "overloaded"
    assert refused.value.retry_after_s
    other = work.submit("guest", 1.0, int)
    gate.opened.set()
    assert [future.result(TIMEOUT_S) for future in [running, *waiting, other]] == [None, "", "", "", 0]
    work.submit("hog", 1.0, str).result(TIMEOUT_S)
    work.close()


def test_a_tenant_takes_no_more_places_than_its_share() -> None:
    gates = [Gate() for _ in range(3)]
    work = FairWork("test", 2, max_waiting=10, share=1)
    futures: list[Future[None]] = [work.submit("hog", 1.0, gate) for gate in gates]
    gates[0].wait()
    assert work.submit("guest", 1.0, lambda: "at once").result(TIMEOUT_S) == "at once"
    assert not gates[1].entered.is_set()
    for gate, future in zip(gates, futures, strict=True):
        gate.opened.set()
        future.result(TIMEOUT_S)
    assert work.waiting("hog") == 0
    work.close()


def test_two_places_run_two_pieces_of_work_at_once() -> None:
    gates = [Gate(), Gate()]
    work = FairWork("test", 2, max_waiting=10)
    futures = [work.submit("ann", 1.0, gate) for gate in gates]
    for gate in gates:
        gate.wait()
    for gate, future in zip(gates, futures, strict=True):
        gate.opened.set()
        future.result(TIMEOUT_S)
    work.close()


@pytest.mark.parametrize("share", [1, 2])
def test_work_that_is_cancelled_before_its_turn_never_runs_and_leaves_its_place(share: int) -> None:
    gate = Gate()
    work = FairWork("test", 1, max_waiting=2, share=share)
    running = work.submit("ann", 1.0, gate)
    gate.wait()
    ran: list[int] = []
    for _ in range(5):
        cancelled = work.submit("ann", 1.0, ran.append, 1)
        assert cancelled.cancel()
        assert cancelled.cancel(), "twice does nothing"
    assert work.waiting("ann") == 0
    kept = work.submit("ann", 1.0, ran.append, 2)
    assert not running.cancel(), "it runs already"
    gate.opened.set()
    kept.result(TIMEOUT_S)
    assert ran == [2]
    work.close()


def test_an_error_reaches_whoever_waits_and_the_place_is_free_again() -> None:
    work = FairWork("test", 1, max_waiting=1)
    with pytest.raises(ZeroDivisionError):
        work.submit("ann", 1.0, divmod, 1, 0).result(TIMEOUT_S)
    assert work.submit("ann", 1.0, divmod, 3, 2).result(TIMEOUT_S) == (1, 1)
    work.close()


def test_closing_cancels_what_waits_and_refuses_what_comes() -> None:
    gate = Gate()
    work = FairWork("test", 1, max_waiting=10, share=1)
    running = work.submit("ann", 1.0, gate)
    gate.wait()
    waiting = [work.submit(tenant, 1.0, int) for tenant in ("ann", "ann", "bob")]
    work.close()
    for future in waiting:
        with pytest.raises(CancelledError):
            future.result(TIMEOUT_S)
    with pytest.raises(TandemError):
        work.submit("ann", 1.0, int)
    gate.opened.set()
    running.result(TIMEOUT_S)


async def test_on_an_event_loop_a_client_that_leaves_takes_its_work_along() -> None:
    gate = Gate()
    work = FairWork("test", 1, max_waiting=10)
    running = asyncio.create_task(work.run("ann", 1.0, gate))
    await asyncio.to_thread(gate.wait)
    ran: list[int] = []
    left = asyncio.create_task(work.run("ann", 1.0, ran.append, 1))
    await asyncio.sleep(0)
    left.cancel()
    with pytest.raises(asyncio.CancelledError):
        await left
    gate.opened.set()
    await running
    assert await work.run("ann", 1.0, divmod, 7, 2) == (3, 1)
    assert ran == []
    work.close()


@given(st.lists(st.tuples(st.sampled_from(list(WEIGHTS)), st.booleans()), max_size=40), st.integers(1, 3))
@settings(deadline=None, max_examples=30)
def test_nothing_is_lost_however_work_comes_and_goes(jobs: list[tuple[str, bool]], places: int) -> None:
    work = FairWork("test", places, max_waiting=100, share=max(1, places - 1))
    futures = [(work.submit(tenant, 1.0, int, number), number, cancel) for number, (tenant, cancel) in enumerate(jobs)]
    for future, _, cancel in futures:
        if cancel:
            future.cancel()
    for future, number, _ in futures:
        assert future.cancelled() or future.result(TIMEOUT_S) == number
    assert all(work.waiting(tenant) == 0 for tenant in WEIGHTS)
    work.close()
