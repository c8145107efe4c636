"""What tenants have used: totals, hours, replicas, Prometheus."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, generate_latest

from tandem.router.tenants import usage as module
from tandem.router.tenants.usage import OTHERS, TenantUsage, UsageCollector, UsageLog, merged


class Clock:
    def __init__(self) -> None:
        self.now = 500_000 * 3600.0

    def __call__(self) -> float:
        return self.now


def ended(log: UsageLog, tenant: str, tokens: int = 10, cached: int = 0, failed: bool = False) -> None:
    log.ended(
        tenant,
        prompt_tokens=tokens,
        completion_tokens=1,
        cached_by_tier={"host": cached} if cached else {},
        failed=failed,
    )


def test_totals_and_hours() -> None:
    clock = Clock()
    log = UsageLog(clock)
    ended(log, "ann", 10)
    clock.now += 1800
    ended(log, "ann", 30, cached=16)
    log.rejected("ann")
    clock.now += 1800
    ended(log, "ann", failed=True)
    (usage,) = log.report("ann")
    shown = msgspec.to_builtins(usage.describe())
    first = 500_000 * 3600
    assert shown == {
        "tenant": "ann",
        "since": first,
        "requests": 3,
        "failed": 1,
        "rejected": 1,
        "prompt_tokens": 40,
        "prompt_tokens_details": {"cached_tokens": 16, "cached_tokens_by_tier": {"host": 16}},
        "completion_tokens": 2,
        "total_tokens": 42,
        "hours": [
            {
                "start": first,
                "requests": 2,
                "rejected": 1,
                "prompt_tokens": 40,
                "cached_tokens": 16,
                "completion_tokens": 2,
            },
            {
                "start": first + 3600,
                "requests": 1,
                "rejected": 0,
                "prompt_tokens": 0,
                "cached_tokens": 0,
                "completion_tokens": 0,
            },
        ],
    }


def test_hours_go_after_a_day_and_totals_stay() -> None:
    clock = Clock()
    log = UsageLog(clock)
    for _ in range(40):
        ended(log, "ann")
        clock.now += 3600
    (usage,) = log.report("ann")
    assert len(usage.hours) == 23  # the running hour has no traffic
    assert usage.hours[-1].start == clock.now - 3600
    assert usage.requests == 40
    clock.now += 12 * 3600
    assert len(log.report("ann")[0].hours) == 11
    clock.now += 24 * 3600
    assert log.report("ann")[0].hours == []


def test_whoever_has_used_nothing_has_a_report_of_zeros() -> None:
    clock = Clock()
    log = UsageLog(clock)
    clock.now += 100
    ended(log, "bob")
    assert log.report("ann") == [TenantUsage("ann", 500_000 * 3600)]
    assert [usage.tenant for usage in log.report()] == ["bob"]


def test_tenants_beyond_the_bound_are_counted_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_TENANTS", 3)
    log = UsageLog(Clock())
    for i in range(10):
        ended(log, f"t{i}")
    assert {usage.tenant: usage.requests for usage in log.report()} == {"t0": 1, "t1": 1, "t2": 1, OTHERS: 7}


_events = st.lists(
    st.tuples(
        st.integers(0, 2),
        st.sampled_from(["ann", "bob", "cy"]),
        st.integers(0, 50_000),
        st.integers(0, 100),
        st.sampled_from(["ended", "failed", "rejected"]),
    ),
    max_size=60,
)


@given(_events)
def test_replicas_together_report_what_one_would(events: list[tuple[int, str, int, int, str]]) -> None:
    clock = Clock()
    replicas, one = [UsageLog(clock) for _ in range(3)], UsageLog(clock)
    for replica, tenant, wait_s, tokens, kind in events:
        clock.now += wait_s
        for log in (replicas[replica], one):
            if kind == "rejected":
                log.rejected(tenant)
            else:
                ended(log, tenant, tokens, cached=tokens // 2, failed=kind == "failed")
    over_the_wire = [msgspec.json.decode(msgspec.json.encode(log.report()), type=list[TenantUsage]) for log in replicas]
    assert merged(over_the_wire) == merged([one.report()])


def test_prometheus_has_few_series_and_they_never_go_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_LABELS", 2)
    monkeypatch.setattr(module, "MAX_TENANTS", 4)
    log = UsageLog(Clock())
    registry = CollectorRegistry()
    registry.register(UsageCollector(log))
    before: dict[str, float] = {}
    for i in range(8):
        ended(log, f"t{i}", cached=4)
        log.rejected(f"t{i}")
        lines = [line.rsplit(" ", 1) for line in generate_latest(registry).decode().splitlines() if line[0] != "#"]
        now = {name: float(value) for name, value in lines}
        assert all(now[name] >= value for name, value in before.items())
        before = now
    assert before['tandem_tenant_requests_total{outcome="served",tenant="t0"}'] == 1
    assert before['tandem_tenant_requests_total{outcome="rejected",tenant="(others)"}'] == 6
    assert before['tandem_tenant_tokens_total{kind="cached",tenant="(others)"}'] == 24
    assert len({name.partition("tenant=")[2] for name in before}) == 3
