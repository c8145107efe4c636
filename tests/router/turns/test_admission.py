"""The queue before the workers: inline grants, fair order, what happens when it is full, deadlines, charges."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tandem.common.errors import TandemError
from tandem.common.fair_queue import QUANTUM
from tandem.common.fairness import OUTPUT_COST, ServiceCounters
from tandem.router.turns.admission import HOLD_S, MAX_GRANTS, MAX_RETRY_AFTER_S, Admission, Waiting


class Desk:
    """An Admission before a pretended worker with `slots` places."""

    def __init__(self, slots: int = 0, **options: Any) -> None:
        self.now = 0.0
        self.slots = slots
        self.worker_wait_s = 0.0
        self.started: list[str] = []
        self.refused: dict[str, TandemError] = {}
        self.counters = ServiceCounters()
        self.admission = Admission(
            self.counters,
            room=lambda *_: self.slots > 0,
            wait_s=lambda _: self.worker_wait_s,
            clock=lambda: self.now,
            **({"max_requests": 100, "max_tokens": 100_000} | options),
        )

    def waiting(self, name: str, tenant: str = "ann", tokens: int = 10, **options: Any) -> Waiting:
        def granted() -> None:
            self.slots -= 1
            self.started.append(name)

        def refused(error: TandemError) -> None:
            assert name not in self.refused
            self.refused[name] = error

        fields = {
            "weight": 1.0,
            "priority": 0,
            "deadline": 1000.0,
            "cached_tokens": lambda: 0,
            "granted": granted,
            "refused": refused,
        }
        return Waiting(tenant=tenant, prompt_tokens=tokens, **(fields | options))

    def submit(self, name: str, tenant: str = "ann", tokens: int = 10, **options: Any) -> Waiting:
        waiting = self.waiting(name, tenant, tokens, **options)
        self.admission.submit(waiting)
        return waiting

    def free(self, slots: int) -> None:
        self.slots += slots
        while self.admission.pump():
            pass


def test_with_room_and_nobody_before_it_a_request_starts_at_once() -> None:
    desk = Desk(slots=1)
    desk.submit("one")
    assert (desk.started, desk.admission.granted, desk.admission.queued) == (["one"], 1, 0)
    desk.submit("two")
    assert (desk.started, desk.admission.waiting_requests, desk.admission.waiting_tokens) == (["one"], 1, 10)
    desk.now = 2.5
    two = desk.submit("three")
    desk.free(2)
    assert desk.started == ["one", "two", "three"]
    assert (two.waited_s, desk.admission.waiting_requests, desk.admission.waiting_tokens) == (0.0, 0, 0)
    assert (desk.admission.granted, desk.admission.queued) == (3, 2)


def test_those_that_have_waited_long_enough_are_refused_and_the_others_wait_on() -> None:
    desk = Desk()
    for at, (name, tenant, priority) in enumerate([("a", "ann", 0), ("b", "bob", 1), ("c", "ann", 0), ("d", "bob", 1)]):
        desk.now = float(at)
        desk.submit(name, tenant, priority=priority)
    error = TandemError("unavailable", "nobody is there")
    desk.admission.refuse_those(1.0, error)
    assert desk.refused == {"a": error, "b": error}
    assert (desk.admission.waiting_requests, desk.admission.waiting_tokens) == (2, 20)
    assert desk.admission.refused == {"unavailable": 2}
    desk.free(2)
    assert desk.started == ["c", "d"]


def test_a_light_tenant_passes_the_backlog_of_a_greedy_one() -> None:
    desk = Desk()
    for number in range(50):
        desk.submit(f"greedy-{number}", "greedy")
    desk.submit("light", "light")
    desk.free(2)
    assert "light" in desk.started


def test_a_higher_band_goes_first() -> None:
    desk = Desk()
    for number in range(5):
        desk.submit(f"low-{number}", priority=5)
    desk.submit("high", "greedy", priority=-1)
    desk.free(1)
    assert desk.started == ["high"]


def test_what_displaces_starts_at_once_and_what_does_not_goes_on_waiting() -> None:
    desk = Desk()
    desk.admission._room = lambda tokens, priority: desk.slots > 0 or priority < 5
    desk.submit("batch", priority=5)
    desk.submit("urgent", priority=0)
    assert (desk.started, desk.admission.waiting_requests) == (["urgent"], 1)
    assert not desk.admission.idle
    desk.slots = 0
    desk.free(1)
    assert desk.started == ["urgent", "batch"]


def test_input_is_charged_with_the_grant_and_corrected_and_output_as_it_comes() -> None:
    desk = Desk(slots=10)
    one = desk.submit("one", "ann", 1000, cached_tokens=lambda: 300, weight=2.0)
    assert desk.counters.values()[0, "ann"] == 350
    desk.admission.computed(one, 900)
    assert desk.counters.values()[0, "ann"] == 450
    desk.admission.produced(one, 10)
    assert desk.counters.values()[0, "ann"] == 450 + 5 * OUTPUT_COST
    desk.admission.charge(one, 40)
    assert desk.counters.values()[0, "ann"] == 470 + 5 * OUTPUT_COST


def test_a_request_that_cannot_start_costs_nothing() -> None:
    desk = Desk(slots=1)

    def broken() -> None:
        raise TandemError("unavailable", "no decode worker")

    with pytest.raises(TandemError, match="no decode worker"):
        desk.submit("one", granted=broken)
    desk.slots = 0
    desk.submit("two", granted=broken)
    desk.submit("three")
    desk.free(2)
    assert desk.refused["two"].code == "unavailable"
    assert desk.started == ["three"]
    assert desk.counters.values()[0, "ann"] == 10


def test_a_full_queue_refuses_with_a_time_to_come_back() -> None:
    desk = Desk(max_requests=3)
    for number in range(3):
        desk.submit(f"{number}")
    with pytest.raises(TandemError, match="3 requests") as caught:
        desk.submit("too many")
    assert caught.value.code == "overloaded"
    assert 1 <= (caught.value.retry_after_s or 0) <= MAX_RETRY_AFTER_S
    assert (desk.admission.refused, desk.refused) == ({"full": 1}, {})


def test_a_full_queue_makes_room_for_a_higher_band_at_the_end_of_the_lowest() -> None:
    desk = Desk(max_requests=3)
    desk.submit("a", priority=1)
    desk.submit("b", priority=9)
    desk.submit("c", priority=9)
    desk.submit("high", priority=0)
    assert set(desk.refused) == {"c"}
    assert desk.refused["c"].code == "overloaded"
    assert desk.refused["c"].retry_after_s
    with pytest.raises(TandemError):
        desk.submit("lower", priority=10)
    desk.free(3)
    assert desk.started == ["high", "a", "b"]


def test_one_tenant_cannot_fill_the_queue_against_another() -> None:
    desk = Desk(max_requests=10)
    for number in range(10):
        desk.submit(f"greedy-{number}", "greedy")
    for number in range(5):
        desk.submit(f"light-{number}", "light")
    assert set(desk.refused) == {f"greedy-{number}" for number in range(5, 10)}
    with pytest.raises(TandemError):
        desk.submit("one too many", "light")
    with pytest.raises(TandemError):
        desk.submit("and here", "greedy")


def test_a_large_prompt_displaces_as_many_as_it_takes_or_nobody() -> None:
    desk = Desk(max_tokens=1000)
    for number in range(10):
        desk.submit(f"{number}", tokens=100, priority=5)
    desk.submit("large", tokens=350)
    assert set(desk.refused) == {"6", "7", "8", "9"}
    with pytest.raises(TandemError):
        desk.submit("larger", tokens=900)
    assert len(desk.refused) == 4
    assert desk.admission.waiting_tokens == 950


def test_a_prompt_above_the_token_limit_can_wait_alone() -> None:
    desk = Desk(max_tokens=1000)
    desk.submit("huge", tokens=5000)
    desk.free(1)
    assert desk.started == ["huge"]


def test_cancelled_requests_leave_no_trace() -> None:
    desk = Desk()
    one = desk.submit("one")
    assert desk.admission.cancel(one)
    assert not desk.admission.cancel(one)
    desk.free(1)
    assert (desk.started, desk.admission.waiting_tokens) == ([], 0)


def test_a_deadline_that_passed_in_the_queue_ends_the_request() -> None:
    desk = Desk()
    desk.submit("late", deadline=5.0)
    desk.submit("in time", deadline=50.0)
    desk.now = 6.0
    desk.free(1)
    assert desk.started == ["in time"]
    assert desk.refused["late"].code == "deadline_exceeded"


def test_what_certainly_misses_the_slo_is_refused_early() -> None:
    desk = Desk(ttft_slo_s=2.0)
    desk.worker_wait_s = 5.0
    with pytest.raises(TandemError, match=r"at least 5\.0 s") as caught:
        desk.submit("hopeless")
    assert caught.value.retry_after_s == 3.0
    desk.worker_wait_s = 1.0
    desk.submit("possible")
    with pytest.raises(TandemError, match="may take"):
        desk.submit("short of time", deadline=0.5)
    assert desk.admission.refused == {"slo": 2}


def test_the_slo_counts_the_own_backlog_at_the_measured_rate_and_not_that_of_others() -> None:
    desk = Desk(ttft_slo_s=10.0)
    for number in range(40):
        desk.submit(f"{number}", "greedy", tokens=100)
    for _ in range(4):  # 400 tokens in 2 s
        desk.now += 0.5
        desk.free(1)
    with pytest.raises(TandemError):
        desk.submit("late", "greedy")
    desk.submit("light", "light")
    desk.submit("high", "greedy", priority=-1)


def test_the_own_backlog_is_counted_to_the_token_whoever_else_comes_and_goes() -> None:
    desk = Desk(ttft_slo_s=10.0)
    backlog = [desk.submit(f"{number}", "greedy", tokens=100) for number in range(24)]
    for _ in range(4):  # 400 tokens in 2 s
        desk.now += 0.5
        desk.free(1)
    assert desk.admission.cancel(desk.submit("light", "light"))
    with pytest.raises(TandemError, match=r"at least 10\.0 s"):
        desk.submit("late", "greedy", deadline=desk.now + 9.99)
    desk.submit("just in time", "greedy", tokens=1)
    with pytest.raises(TandemError):
        desk.submit("late", "greedy")
    for waiting in backlog[4:]:
        desk.admission.cancel(waiting)
    desk.free(1)
    assert desk.started[4:] == ["just in time"]
    assert not desk.admission._backlogs


def test_the_room_is_left_to_tenants_who_wait_at_another_replica_but_not_for_long() -> None:
    desk = Desk(slots=5)
    ahead = desk.submit("first", "greedy")
    desk.admission.charge(ahead, QUANTUM)
    desk.counters.merge({}, {}, {0: 1.0})
    desk.submit("greedy", "greedy")
    assert desk.started == ["first"], "a tenant that is ahead may not even start inline"
    desk.submit("light", "light")
    assert desk.started == ["first", "light"]
    desk.now = HOLD_S - 0.01
    desk.free(0)
    assert desk.started == ["first", "light"]
    desk.slots = 0  # the other replica took the room
    desk.free(0)
    desk.now += HOLD_S
    desk.free(1)
    assert desk.started == ["first", "light"]
    desk.now += HOLD_S  # and here it did not
    desk.free(0)
    assert desk.started == ["first", "light", "greedy"]


def test_a_turn_at_another_replica_ends_when_its_tenants_have_caught_up() -> None:
    desk = Desk(slots=5)
    ahead = desk.submit("first", "greedy")
    desk.admission.charge(ahead, QUANTUM)
    desk.counters.merge({}, {}, {0: 1.0})
    desk.submit("greedy", "greedy")
    desk.counters.merge({}, {}, {0: 500.0})
    desk.free(0)
    assert desk.started == ["first", "greedy"]


def test_a_higher_band_that_waits_at_another_replica_goes_first() -> None:
    desk = Desk(slots=5)
    desk.counters.merge({}, {}, {0: 1e9})
    desk.submit("batch", "light", priority=3)
    desk.submit("urgent", "light", priority=-3)
    assert desk.started == ["urgent"]


def test_calls_from_inside_a_grant_do_not_disturb_the_pump() -> None:
    desk = Desk()
    started: list[str] = []

    def start(name: str, then: Callable[[], object]) -> Callable[[], None]:
        def granted() -> None:
            desk.slots -= 1
            started.append(name)
            then()

        return granted

    three = desk.waiting("three", granted=start("three", lambda: None))
    two = desk.waiting("two", granted=start("two", lambda: desk.admission.cancel(three)))
    four = desk.waiting("four", granted=start("four", desk.admission.pump))
    one = desk.waiting("one", granted=start("one", lambda: desk.admission.submit(four)))
    for waiting in (one, two, three):
        desk.admission.submit(waiting)
    desk.free(10)
    assert started == ["one", "two", "four"]


def test_one_pump_does_not_hold_the_event_loop_for_long() -> None:
    desk = Desk(max_requests=1000)
    for number in range(MAX_GRANTS + 5):
        desk.submit(f"{number}")
    desk.slots = 1000
    assert desk.admission.pump()
    assert len(desk.started) == MAX_GRANTS
    assert not desk.admission.pump()
    assert len(desk.started) == MAX_GRANTS + 5


@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["submit", "submit", "free", "cancel"]),
            st.sampled_from(["ann", "bob", "cat"]),
            st.integers(1, 400),
            st.integers(0, 2),
        ),
        max_size=80,
    )
)
def test_every_request_ends_in_exactly_one_way_and_the_bounds_hold(script: list[tuple[str, str, int, int]]) -> None:
    desk = Desk(max_requests=8, max_tokens=1000)
    ends: dict[str, list[str]] = defaultdict(list)
    waiting: dict[str, Waiting] = {}
    for number, (what, tenant, amount, priority) in enumerate(script):
        name = f"{number}"
        if what == "submit":
            waiting[name] = desk.waiting(name, tenant, amount, priority=priority)
            try:
                desk.admission.submit(waiting[name])
            except TandemError as error:
                ends[name].append("raised" if error.retry_after_s else "raised without a time to come back")
        elif what == "free":
            desk.free(amount % 3)
        elif waiting:
            chosen = sorted(waiting)[amount % len(waiting)]
            if desk.admission.cancel(waiting[chosen]):
                ends[chosen].append("cancelled")
        assert desk.admission.waiting_requests <= 8
        assert desk.admission.waiting_tokens <= 1000
        assert desk.slots == 0 or not desk.admission.waiting_requests, "room and somebody waits"
    desk.free(1000)
    for name in desk.started:
        ends[name].append("started")
    for name in desk.refused:
        ends[name].append("refused")
    assert not any("raised without a time to come back" in how for how in ends.values())
    assert {name: len(how) for name, how in ends.items()} == dict.fromkeys(waiting, 1)
    assert (desk.admission.waiting_requests, desk.admission.waiting_tokens) == (0, 0)


def crowded(crowd: str) -> Desk:
    """A desk without room, whose workers are full of one tenant's requests."""
    desk = Desk(claims=lambda tenant, weight, priority: tenant != crowd and priority == 0)
    desk.submit("h1", "hog")
    desk.submit("h2", "hog")
    return desk


def test_who_is_crowded_out_neither_waits_for_room_nor_behind_the_crowd() -> None:
    desk = crowded("hog")
    assert desk.started == []
    desk.submit("v1", "victim")
    assert desk.started == ["v1"]
    assert desk.admission.waiting_requests == 2
    desk.counters.charge("victim", 0, 10_000.0, 1.0)
    desk.submit("v2", "victim")
    assert desk.started == ["v1", "v2"], "although it is the other one's turn"
    desk.slots = 0
    desk.free(2)
    assert desk.started == ["v1", "v2", "h1", "h2"]


def test_a_crowd_that_waits_alone_waits() -> None:
    desk = crowded("hog")
    for _ in range(3):
        assert not desk.admission.pump()
    desk.submit("late", "victim", priority=1)
    assert desk.started == [], "bands are strict"
