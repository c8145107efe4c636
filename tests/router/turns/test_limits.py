"""Rate limits: what they let through, what they refuse, and what they say."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tandem.router.tenants.caller import Caller, Rates
from tandem.router.turns import limits as module
from tandem.router.turns.limits import (
    BYTES_PER_REQUEST,
    BYTES_PER_TOKEN,
    FIRST_OUTPUT_GUESS,
    Buckets,
    Limits,
    LocalBuckets,
    Place,
    RateLimited,
    Reservation,
    duration,
)
from tandem.router.turns.shared_buckets import SharedBuckets


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def tenant(name: str = "ann", **rates: int) -> Caller:
    return Caller(name, rates=Rates(**rates))


def pair(make: Callable[[Clock], Buckets] = LocalBuckets) -> tuple[Limits, Clock]:
    clock = Clock()
    return Limits(make(clock)), clock


class Asked:
    """A request that was let in by a front door, and by what opens calls."""

    def __init__(self, place: Place, reservation: Reservation) -> None:
        self._place = place
        self._reservation = reservation
        self.settle = reservation.settle

    def close(self) -> None:
        self._reservation.close()
        self._place.close()


def ask(limits: Limits, caller: Caller, prompt_tokens: int, max_output_tokens: int) -> Asked:
    place = limits.enter(caller, tokens=False)
    try:
        return Asked(place, limits.reserve(caller, prompt_tokens, max_output_tokens))
    except RateLimited:
        place.give_back()
        place.close()
        raise


both = pytest.mark.parametrize("make", [LocalBuckets, SharedBuckets])
"""Shared buckets whose Redis is away and that know of no other replica do what local ones do."""


def headers(limits: Limits, caller: Caller) -> dict[str, str]:
    return {name.decode(): value.decode() for name, value in limits.headers(caller)}


def refusal(limits: Limits, caller: Caller, prompt_tokens: int = 1, max_output_tokens: int = 1) -> RateLimited:
    with pytest.raises(RateLimited) as caught:
        ask(limits, caller, prompt_tokens, max_output_tokens)
    assert caught.value.code == "rate_limit_exceeded"
    assert caller.tenant in caught.value.message
    return caught.value


def test_requests_come_back_at_their_rate() -> None:
    limits, clock = pair()
    ann, bob = tenant(requests_per_minute=6), tenant("bob", requests_per_minute=6)
    for _ in range(6):
        ask(limits, ann, 1, 1).close()
    error = refusal(limits, ann)
    assert (error.limit, error.retry_after_s) == ("requests", pytest.approx(10))
    ask(limits, bob, 1, 1).close()  # has a bucket of its own
    clock.now += 9.9
    assert refusal(limits, ann).retry_after_s == pytest.approx(0.1)
    clock.now += 0.1
    ask(limits, ann, 1, 1).close()
    refusal(limits, ann)


@both
def test_waiting_as_told_is_enough(make: Callable[[Clock], Buckets]) -> None:
    limits, clock = pair(make)
    ann = tenant(requests_per_minute=7, tokens_per_minute=997)
    served = 0
    while served < 50:
        try:
            ask(limits, ann, 101, 3).settle(101, 3)
        except RateLimited as error:
            clock.now += error.retry_after_s or 0.0
            ask(limits, ann, 101, 3).settle(101, 3)
        served += 1


def test_tokens_are_corrected_at_the_end() -> None:
    limits, _ = pair()
    ann = tenant(tokens_per_minute=1000)
    reservation = ask(limits, ann, 300, 10_000)
    assert headers(limits, ann)["x-ratelimit-remaining-tokens"] == str(1000 - 300 - FIRST_OUTPUT_GUESS)
    reservation.settle(300, 50)
    reservation.close()
    reservation.close()  # a second time changes nothing
    assert headers(limits, ann)["x-ratelimit-remaining-tokens"] == "650"
    ask(limits, ann, 100, 5).close()  # never settled: it failed, and is free
    assert headers(limits, ann)["x-ratelimit-remaining-tokens"] == "650"


def test_debt_is_paid_before_the_next_request() -> None:
    limits, clock = pair()
    ann = tenant(tokens_per_minute=600)
    reservation = ask(limits, ann, 100, 10_000)
    reservation.settle(100, 800)
    reservation.close()
    assert headers(limits, ann)["x-ratelimit-remaining-tokens"] == "0"
    with pytest.raises(RateLimited) as caught:
        limits.enter(ann).close()
    assert caught.value.retry_after_s == pytest.approx(30.1)  # 300 of debt and one token, at 10 a second
    clock.now += 30.1
    limits.enter(ann).close()


def test_a_request_larger_than_the_limit_passes_when_the_bucket_is_full_and_costs_all_of_it() -> None:
    limits, clock = pair()
    ann = tenant(tokens_per_minute=600)
    reservation = ask(limits, ann, 6000, 1)
    reservation.settle(6000, 1)
    reservation.close()
    assert refusal(limits, ann).retry_after_s == pytest.approx((6001 - 600 + 2) / 10)
    clock.now += 540.3
    ask(limits, ann, 1, 1)


def test_the_output_guess_follows_the_tenant() -> None:
    limits, _ = pair()
    ann = tenant(tokens_per_minute=10**9)

    def taken(max_output_tokens: int) -> float:
        before = limits._level(ann, "tokens", 10**9)
        reservation = ask(limits, ann, 0, max_output_tokens)
        after = limits._level(ann, "tokens", 10**9)
        reservation.settle(0, 20)
        reservation.close()
        return before - after

    assert taken(10_000) == pytest.approx(FIRST_OUTPUT_GUESS)
    for _ in range(100):
        taken(10_000)
    assert 20 <= taken(10_000) <= 22
    assert taken(5) == pytest.approx(5)


def test_requests_in_flight() -> None:
    limits, _ = pair()
    ann = tenant(max_concurrent=2)
    first, second = ask(limits, ann, 1, 1), ask(limits, ann, 1, 1)
    assert refusal(limits, ann).limit == "concurrency"
    with pytest.raises(RateLimited):
        limits.enter(ann).close()
    first.close()
    first.close()
    third = ask(limits, ann, 1, 1)
    refusal(limits, ann)
    second.close()
    third.close()
    assert limits.running(ann) == 0


def test_what_was_read_in_vain_is_charged_by_its_size() -> None:
    limits, _ = pair()
    ann = tenant(requests_per_minute=200, tokens_per_minute=200_000, max_concurrent=1)
    place = limits.enter(ann)
    place.charge(100)
    place.close()
    assert headers(limits, ann)["x-ratelimit-remaining-requests"] == "199"
    assert headers(limits, ann)["x-ratelimit-remaining-tokens"] == str(200_000 - 100 // BYTES_PER_TOKEN)
    place = limits.enter(ann)
    place.charge(8 << 20)
    place.close()
    assert headers(limits, ann)["x-ratelimit-remaining-requests"] == str(198 - (8 << 20) // BYTES_PER_REQUEST)
    assert int(headers(limits, ann)["x-ratelimit-remaining-tokens"]) < 200_000 - (8 << 20) // BYTES_PER_TOKEN
    assert limits.running(ann) == 0


def test_a_large_body_that_came_while_others_took_all_is_not_looked_at() -> None:
    limits, _ = pair()
    ann = tenant(requests_per_minute=200)
    asked, counted, later = limits.enter(ann), limits.enter(ann, tokens=False), limits.enter(ann, tokens=False)
    asked.has_read(8 << 20)
    counted.has_read(8 << 20)
    asked.begin()
    counted.begin()
    more = [limits.enter(ann, tokens=False)]
    more[0].has_read(8 << 20)
    with pytest.raises(RateLimited):
        later.has_read(8 << 20)
    with pytest.raises(RateLimited):
        asked.begin()
    counted.begin()
    left = headers(limits, ann)["x-ratelimit-remaining-requests"]
    counted.charge(8 << 20)
    assert headers(limits, ann)["x-ratelimit-remaining-requests"] == left, "it has been charged"


def test_a_refusal_takes_nothing() -> None:
    limits, _ = pair()
    ann = tenant(requests_per_minute=10, tokens_per_minute=1000, max_concurrent=5)
    ask(limits, ann, 900, 1)
    before = headers(limits, ann)
    assert refusal(limits, ann, prompt_tokens=200).limit == "tokens"
    assert headers(limits, ann) == before
    assert limits.running(ann) == 1


def test_unlimited_tenants_have_no_state_and_no_headers() -> None:
    limits, _ = pair()
    ann = tenant()
    reservation = ask(limits, ann, 10**9, 10**9)
    limits.enter(ann).close()
    reservation.settle(1, 1)
    reservation.close()
    assert limits.headers(ann) == []
    assert not limits._states


def test_headers_name_the_limits_that_there_are() -> None:
    limits, clock = pair()
    ann = tenant(requests_per_minute=60)
    ask(limits, ann, 1, 1).close()
    assert headers(limits, ann) == {
        "x-ratelimit-limit-requests": "60",
        "x-ratelimit-remaining-requests": "59",
        "x-ratelimit-reset-requests": "1s",
    }
    clock.now += 100
    assert headers(limits, ann)["x-ratelimit-reset-requests"] == "0s"


def test_new_limits_hold_at_once_for_what_is_running() -> None:
    limits, _ = pair()
    old = tenant(max_concurrent=4, tokens_per_minute=1000)
    reservations = [ask(limits, old, 1, 1) for _ in range(4)]
    new = replace(old, rates=Rates(max_concurrent=2, tokens_per_minute=100))
    refusal(limits, new)
    for reservation in reservations[:3]:
        reservation.settle(1, 1)
        reservation.close()
    ask(limits, new, 1, 1)
    refusal(limits, new)


def test_names_that_come_and_go_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_STATES", 50)
    limits, clock = pair()
    kept = ask(limits, tenant("kept", max_concurrent=1), 1, 1)
    for i in range(500):
        ask(limits, tenant(f"t{i}", requests_per_minute=60), 1, 1).close()
        clock.now += 2
    assert len(limits._states) <= 50
    assert len(limits._buckets._full_at) <= 50  # type: ignore[attr-defined]
    refusal(limits, tenant("kept", max_concurrent=1))
    kept.close()


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0s"),
        (0.0001, "1ms"),
        (0.12, "120ms"),
        (1, "1s"),
        (1.5, "1.5s"),
        (59.9996, "1m0s"),
        (360, "6m0s"),
        (3661.25, "1h1m1.25s"),
    ],
)
def test_durations_as_openai_writes_them(seconds: float, text: str) -> None:
    assert duration(seconds) == text


_steps = st.lists(
    st.tuples(
        st.floats(0, 20, allow_nan=False), st.integers(1, 300), st.integers(0, 400), st.integers(0, 3), st.booleans()
    ),
    max_size=60,
)


@both
@given(steps=_steps, per_minute=st.integers(1, 600), tokens_per_minute=st.integers(1, 2000))
def test_buckets_do_what_a_plain_account_book_says(
    make: Callable[[Clock], Buckets],
    steps: list[tuple[float, int, int, int, bool]],
    per_minute: int,
    tokens_per_minute: int,
) -> None:
    """The reference keeps levels; also: never more than rate * T + burst + what was underestimated."""
    limits, clock = pair(make)
    ann = tenant(requests_per_minute=per_minute, tokens_per_minute=tokens_per_minute)
    level, at, underestimated, start = float(tokens_per_minute), clock.now, 0.0, clock.now
    requests, total, largest = float(per_minute), 0, 0
    running = []
    for wait_s, prompt, output, ends, fails in steps:
        clock.now += wait_s
        level = min(tokens_per_minute, level + (clock.now - at) * tokens_per_minute / 60)
        requests = min(per_minute, requests + (clock.now - at) * per_minute / 60)
        at = clock.now
        guess = limits._states["ann"].output_guess if "ann" in limits._states else FIRST_OUTPUT_GUESS
        estimate = prompt + min(output + 5, -int(-guess // 1))
        needed = min(estimate, tokens_per_minute)
        if min(abs(level - needed), abs(requests - 1)) > 1e-6:  # else rounding decides
            fits = level >= needed and requests >= 1
            try:
                running.append((ask(limits, ann, prompt, output + 5), estimate, prompt, output))
                assert fits
            except RateLimited:
                assert not fits
            else:
                level, requests = level - estimate, requests - 1
                largest = max(largest, estimate)
        for _ in range(min(ends, len(running))):
            reservation, estimate, prompt, output = running.pop(0)
            used = 0
            if not fails:
                reservation.settle(prompt, output)
                used = prompt + output
            reservation.close()
            level = min(tokens_per_minute, level + estimate - used)
            underestimated += max(0, used - estimate)
            total += used
        bound = tokens_per_minute / 60 * (clock.now - start) + max(tokens_per_minute, largest) + underestimated
        assert total <= bound + 1e-6
        assert limits._level(ann, "tokens", tokens_per_minute) == pytest.approx(level, abs=1e-5)
        assert limits._level(ann, "requests", per_minute) == pytest.approx(requests, abs=1e-5)
