"""Sick workers are left out, come back by themselves, and never all at once; retries are bounded."""

from __future__ import annotations

import asyncio
import hashlib
import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tandem.router.fleet import health
from tandem.router.fleet.health import FIRST_OUT_S, LONGEST_OUT_S, PROBE_S, WorkerHealth, eject_outliers
from tandem.router.fleet.retry import BURST, FLOOR_PER_S, LONGEST_PAUSE_S, SHARE, RetryBudget, pause_s
from tests.router.conftest import House, until
from tests.router.fake_worker import Script

BODY = {"prompt": "Hello world", "max_tokens": 4}


def test_the_circuit_opens_after_failures_in_a_row() -> None:
    worker = WorkerHealth()
    assert not worker.failed(0.0)
    assert not worker.failed(0.1)
    worker.answered(0.2)
    assert not worker.failed(0.3)
    assert not worker.failed(0.4)
    assert worker.available(0.4)
    assert worker.failed(0.5)
    assert not worker.available(0.5)
    assert "3 failures" in worker.problem


def opened(now: float = 0.0) -> WorkerHealth:
    worker = WorkerHealth()
    for _ in range(health.FAILURES_IN_A_ROW):
        worker.failed(now)
    return worker


def test_one_probe_at_a_time_decides() -> None:
    worker = opened()
    assert not worker.available(FIRST_OUT_S - 0.1)
    worker.answered(FIRST_OUT_S - 0.1)
    assert not worker.available(FIRST_OUT_S - 0.1), "an answer of before says little"
    now = FIRST_OUT_S + 0.1
    assert worker.available(now)
    worker.started(now)
    assert not worker.available(now + 1), "a probe is under way"
    assert worker.available(now + PROBE_S), "it was not answered"
    worker.answered(now + 2)
    assert worker.available(now + 2)
    assert worker.available(now + 3)


def test_a_failed_probe_doubles_the_absence() -> None:
    worker, now, waits = opened(), 0.0, []
    for _ in range(8):
        begin = now
        while not worker.available(now):
            now += 0.5
        waits.append(now - begin)
        worker.started(now)
        worker.failed(now)
    assert waits[:4] == [5.0, 10.0, 20.0, 40.0]
    assert waits[-1] == LONGEST_OUT_S


def test_requests_of_several_tenants_that_cannot_be_computed_speak_against_the_worker() -> None:
    worker = WorkerHealth()
    for number in range(20):
        assert not worker.doubted(float(number), "loud")
    assert not worker.doubted(20.0, "second")
    worker.answered(20.5)
    assert not worker.doubted(21.0, "third")
    assert not worker.doubted(21.1, "loud")
    assert worker.available(21.2)
    assert worker.doubted(21.3, "second")
    assert not worker.available(21.4)
    assert "3 tenants" in worker.problem


def test_one_tenants_requests_do_not_keep_a_worker_out_that_can_come_back() -> None:
    worker = opened()
    probing = FIRST_OUT_S + 0.1
    for _ in range(20):
        assert worker.available(probing)
        worker.started(probing)
        assert not worker.doubted(probing, "loud")
    worker.started(probing)
    worker.answered(probing, 0.1)
    assert worker.available(probing)


def test_probes_of_several_tenants_that_cannot_be_computed_keep_it_out() -> None:
    worker = opened()
    probing = FIRST_OUT_S + 0.1
    for tenant in ("a", "b", "c"):
        assert worker.available(probing)
        worker.started(probing)
        assert not worker.doubted(probing, tenant)
    assert not worker.available(probing + FIRST_OUT_S)
    assert worker.available(probing + 2 * FIRST_OUT_S)


def served(answers: int, failures: int = 0, ttft_s: float = 0.1) -> WorkerHealth:
    """Failures spread out, so that the circuit stays closed."""
    worker = WorkerHealth()
    for _ in range(max(answers, failures)):
        if failures > 0:
            worker.failed(0.0)
            failures -= 1
        if answers > 0:
            worker.answered(0.0, ttft_s)
            answers -= 1
    return worker


def test_the_one_that_fails_far_more_often_is_left_out() -> None:
    bad = served(12, 6)
    good = [served(20), served(20, 1), served(20)]
    assert eject_outliers([*good, bad], 0.0) == [bad]
    assert not bad.available(0.0)
    assert "33% of its requests failed" in bad.problem


def test_the_one_that_is_far_slower_is_left_out() -> None:
    slow = served(10, ttft_s=4.0)
    assert eject_outliers([served(10, ttft_s=0.5), slow, served(10, ttft_s=0.6)], 0.0) == [slow]
    assert "first tokens after 4 s" in slow.problem


def test_who_is_not_far_off_stays() -> None:
    assert not eject_outliers([served(10, ttft_s=0.01), served(10, ttft_s=0.5), served(10, ttft_s=0.02)], 0.0)
    assert not eject_outliers([served(10, ttft_s=2.0), served(10, ttft_s=6.0)], 0.0)
    assert not eject_outliers([served(12, 6), served(12, 6), served(12, 5)], 0.0), "all fail: it is not the worker"
    assert not eject_outliers([served(20), served(3, 2)], 0.0), "too few requests to tell"
    assert not eject_outliers([served(12, 11)], 0.0), "there is nobody else"


def test_old_failures_are_forgotten() -> None:
    bad, good = served(12, 6), served(20)
    later = 20 * health.HALF_LIFE_S
    for _ in range(12):
        good.answered(later)
        bad.answered(later)
    assert not eject_outliers([good, bad], later)


calls = st.lists(st.tuples(st.integers(0, 8), st.sampled_from(["answer", "slow", "fail", "start"])), max_size=200)


@given(count=st.integers(1, 9), calls=calls)
def test_ejection_is_bounded_and_everybody_comes_back(count: int, calls: list[tuple[int, str]]) -> None:
    workers = [WorkerHealth() for _ in range(count)]
    now = 0.0
    for index, call in calls:
        now += 0.05
        worker = workers[index % count]
        match call:
            case "answer":
                worker.answered(now, 0.1)
            case "slow":
                worker.answered(now, 30.0)
            case "fail":
                worker.failed(now)
            case _:
                worker.started(now)
        out = sum(worker._out for worker in workers)
        ejected = eject_outliers(workers, now)
        assert len(ejected) <= max(max(count // 3, int(count > 1)) - out, 0)
        assert count > 1 or not ejected
    assert all(worker.available(now + LONGEST_OUT_S + PROBE_S) for worker in workers)


@given(steps=st.lists(st.tuples(st.floats(0, 0.4), st.booleans()), max_size=300))
def test_retries_stay_within_their_budget(steps: list[tuple[float, bool]]) -> None:
    budget, now, requests, granted = RetryBudget(), 100.0, 0, 0
    for _ in range(int(BURST)):
        assert budget.take(now)
    for pause, request in steps:
        now += pause
        if request:
            budget.request()
            requests += 1
        granted += sum(budget.take(now) for _ in range(10))
        earned = SHARE * requests + FLOOR_PER_S * (now - 100.0)
        assert earned - 1.0 - 1e-6 <= granted <= earned + 1e-6


def test_the_budget_does_not_grow_without_end() -> None:
    budget = RetryBudget()
    assert budget.take(0.0)
    for _ in range(100_000):
        budget.request()
    assert sum(budget.take(1e6) for _ in range(5000)) == BURST


def test_pauses_grow_and_spread() -> None:
    assert pause_s(0, 0.0) == 0.0
    assert pause_s(0, 0.5) < pause_s(1, 0.5) < pause_s(2, 0.5)
    assert pause_s(10**6, 0.999) <= LONGEST_PAUSE_S


async def test_a_worker_that_fails_everything_is_left_out_and_tried_again(house: House) -> None:
    sick = await house.decode("decode-0", Script(error=("internal", "broken device")))
    well = await house.decode("decode-1")
    router = await house.router(sick, well)
    client = await house.client(router)
    for number in range(12):
        body = {**BODY, "prompt": [20 + number]}
        assert (await client.post("/v1/completions", json=body)).status_code == 200
    assert len(sick.submits) == health.FAILURES_IN_A_ROW
    assert [session.name for session in router.fleet.decode] == ["decode-1"]
    sick.script.error = None
    state = router.fleet.clients[0].health
    state._out_until = 0.0  # as if its time were over
    requests = [client.post("/v1/completions", json={**BODY, "prompt": [50 + i]}) for i in range(8)]
    assert {answer.status_code for answer in await asyncio.gather(*requests)} == {200}
    assert len(router.fleet.decode) == 2
    assert len(sick.submits) > health.FAILURES_IN_A_ROW


async def test_the_last_worker_is_used_even_if_it_is_sick(house: House) -> None:
    worker, client = await house.pair(Script(error=("internal", "broken device")))
    for _ in range(5):
        assert (await client.post("/v1/completions", json=BODY)).status_code == 500
    worker.script.error = None
    assert (await client.post("/v1/completions", json=BODY)).status_code == 200


async def test_a_worker_that_computes_nothing_right_is_left_out_but_not_by_one_tenants_requests(house: House) -> None:
    sick = await house.decode("decode-0", Script(error=("computation_failed", "not finite")))
    well = await house.decode("decode-1")
    tenants = [f"tenant-{number}" for number in range(health.FAILURES_IN_A_ROW)]
    keys = house.folder / "keys"
    keys.write_text("\n".join(f"{name}:{hashlib.sha256(name.encode()).hexdigest()}" for name in tenants))
    router = await house.router(sick, well, api_keys_file=keys)
    client = await house.client(router)
    prompts = itertools.count(20)

    async def ask(tenant: str) -> int:
        body, headers = {**BODY, "prompt": [next(prompts)]}, {"authorization": f"Bearer {tenant}"}
        return (await client.post("/v1/completions", json=body, headers=headers)).status_code

    async def failed(tenant: str) -> None:
        for _ in range(100):
            if await ask(tenant) == 500:
                return
        raise AssertionError("no request came to the worker that is sick")

    for _ in range(2 * health.FAILURES_IN_A_ROW):
        await failed(tenants[0])
    assert len(router.fleet.decode) == 2
    for tenant in tenants[1:]:
        await failed(tenant)
    assert [session.name for session in router.fleet.decode] == ["decode-1"]
    assert [await ask(tenant) for tenant in tenants] == [200] * len(tenants)


@pytest.mark.parametrize("code", ["internal", "computation_failed"])
async def test_a_prefill_worker_that_fails_everything_is_left_out(house: House, code: str) -> None:
    decode = await house.decode()
    prefill = await house.prefill("prefill-0", Script(handover="error", error=(code, "broken device")), to=(decode,))
    other = await house.prefill("prefill-1", to=(decode,))
    router = await house.router(decode, prefill, other)
    client = await house.client(router)
    for number in range(12):
        body = {**BODY, "prompt": [20 + number] * 40}
        assert (await client.post("/v1/completions", json=body)).status_code == 200
    assert len(prefill.submits) == health.FAILURES_IN_A_ROW
    assert [session.name for session in router.fleet.prefill] == ["prefill-1"]


async def test_a_dying_worker_counts_as_one_failure_however_many_requests_it_had(house: House) -> None:
    worker = await house.decode(script=Script(hold_after=1))
    router = await house.router(worker)
    client = await house.client(router)
    requests = [asyncio.create_task(client.post("/v1/completions", json=BODY)) for _ in range(6)]
    await until(lambda: worker.sent >= 6)
    await worker.kill()
    await until(lambda: router.fleet.clients[0].health._in_a_row)
    assert router.fleet.clients[0].health._in_a_row == 1
    worker.script = Script()
    await worker.restart()
    assert {answer.status_code for answer in await asyncio.gather(*requests)} == {200}
