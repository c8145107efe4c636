"""What each tenant has used since the router started, with the last 24 hours by hour. Kept in memory, bounded."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import msgspec
from prometheus_client.core import CounterMetricFamily, Metric
from prometheus_client.registry import Collector

HOURS = 24
HOUR_S = 3600
MAX_TENANTS = 10_000
"""More are counted together, under OTHERS."""
MAX_LABELS = 200
"""Tenants with Prometheus series of their own: the first that came; the others share OTHERS."""
OTHERS = "(others)"
"""No tenant can have this name."""


class Hour(msgspec.Struct):
    """What was used in one hour."""

    start: int
    """Seconds since 1970, a multiple of 3600."""
    requests: int = 0
    rejected: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0


class TenantUsage(msgspec.Struct):
    """Usage of one tenant, in memory and between routers."""

    tenant: str
    since: int
    """Seconds since 1970: counting began."""
    requests: int = 0
    """Those that were let in and have ended."""
    failed: int = 0
    """Requests among them that ended with an error before any output; their tokens do not count."""
    rejected: int = 0
    """Turned away: over a limit, or because the router was overloaded. No part of `requests`."""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_by_tier: dict[str, int] = {}
    """Prompt tokens that were not computed, by where their KV came from."""
    hours: list[Hour] = []
    """Oldest first; those without traffic are missing."""

    def describe(self) -> dict[str, Any]:
        """The usage as /v1/usage writes it: JSON values."""
        return {
            "tenant": self.tenant,
            "since": self.since,
            "requests": self.requests,
            "failed": self.failed,
            "rejected": self.rejected,
            "prompt_tokens": self.prompt_tokens,
            "prompt_tokens_details": {
                "cached_tokens": sum(self.cached_by_tier.values()),
                "cached_tokens_by_tier": self.cached_by_tier,
            },
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "hours": self.hours,
        }


class UsageLog:
    """`clock` gives seconds since 1970."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._since = int(clock())
        self._tenants: dict[str, TenantUsage] = {}

    def ended(
        self,
        tenant: str,
        *,
        prompt_tokens: int,
        completion_tokens: int,
        cached_by_tier: Mapping[str, int],
        failed: bool = False,
    ) -> None:
        """Counts one request that was let in and is over. The tokens of a failed one do not count."""
        usage = self._of(tenant)
        hour = self._hour(usage)
        usage.requests += 1
        hour.requests += 1
        if failed:
            usage.failed += 1
            return
        usage.prompt_tokens += prompt_tokens
        hour.prompt_tokens += prompt_tokens
        usage.completion_tokens += completion_tokens
        hour.completion_tokens += completion_tokens
        for tier, tokens in cached_by_tier.items():
            usage.cached_by_tier[tier] = usage.cached_by_tier.get(tier, 0) + tokens
            hour.cached_tokens += tokens

    def rejected(self, tenant: str) -> None:
        usage = self._of(tenant)
        usage.rejected += 1
        self._hour(usage).rejected += 1

    def report(self, tenant: str | None = None) -> list[TenantUsage]:
        """Usage of one tenant, who may have used nothing yet, or of all that have used something."""
        usages = list(self._tenants.values())
        if tenant is not None:
            usages = [self._tenants.get(tenant) or TenantUsage(tenant, self._since)]
        oldest = self._now() - (HOURS - 1) * HOUR_S
        for usage in usages:
            usage.hours = [hour for hour in usage.hours if hour.start >= oldest]
        return usages

    def _of(self, tenant: str) -> TenantUsage:
        usage = self._tenants.get(tenant)
        if usage is None:
            if len(self._tenants) >= MAX_TENANTS and tenant != OTHERS:
                return self._of(OTHERS)
            usage = self._tenants[tenant] = TenantUsage(tenant, self._since)
        return usage

    def _now(self) -> int:
        """The running hour's start."""
        return int(self._clock()) // HOUR_S * HOUR_S

    def _hour(self, usage: TenantUsage) -> Hour:
        start = self._now()
        if not usage.hours or usage.hours[-1].start < start:
            usage.hours = [*usage.hours[-(HOURS - 1) :], Hour(start)]
        return usage.hours[-1]


def merged(reports: Iterable[Iterable[TenantUsage]]) -> list[TenantUsage]:
    """What several routers counted, as one; by name."""
    found: dict[str, TenantUsage] = {}
    for report in reports:
        for usage in report:
            mine = found.get(usage.tenant)
            found[usage.tenant] = usage if mine is None else _sum(mine, usage)
    return [found[name] for name in sorted(found)]


def _sum(a: TenantUsage, b: TenantUsage) -> TenantUsage:
    hours: dict[int, Hour] = {}
    for hour in (*a.hours, *b.hours):
        other = hours.get(hour.start, Hour(hour.start))
        hours[hour.start] = Hour(
            hour.start,
            other.requests + hour.requests,
            other.rejected + hour.rejected,
            other.prompt_tokens + hour.prompt_tokens,
            other.cached_tokens + hour.cached_tokens,
            other.completion_tokens + hour.completion_tokens,
        )
    return TenantUsage(
        a.tenant,
        min(a.since, b.since),
        requests=a.requests + b.requests,
        failed=a.failed + b.failed,
        rejected=a.rejected + b.rejected,
        prompt_tokens=a.prompt_tokens + b.prompt_tokens,
        completion_tokens=a.completion_tokens + b.completion_tokens,
        cached_by_tier=dict(Counter(a.cached_by_tier) + Counter(b.cached_by_tier)),
        hours=[hours[start] for start in sorted(hours)][-HOURS:],
    )


class UsageCollector(Collector):
    """Prometheus counters, made when asked: counting costs a request nothing."""

    def __init__(self, usage: UsageLog) -> None:
        self._usage = usage

    def collect(self) -> Iterator[Metric]:
        """Requests and tokens by tenant, in Prometheus' form."""

        def counter(name: str, text: str, *labels: str) -> CounterMetricFamily:
            return CounterMetricFamily(f"tandem_tenant_{name}", text, labels=["tenant", *labels])

        requests = counter("requests", "Requests by how they went: served, failed, rejected", "outcome")
        tokens = counter("tokens", "Tokens: prompt, cached (part of prompt), completion", "kind")
        for usage in _labelled(self._usage.report()):
            for outcome, count in (
                ("served", usage.requests - usage.failed),
                ("failed", usage.failed),
                ("rejected", usage.rejected),
            ):
                requests.add_metric([usage.tenant, outcome], count)
            for kind, count in (
                ("prompt", usage.prompt_tokens),
                ("cached", sum(usage.cached_by_tier.values())),
                ("completion", usage.completion_tokens),
            ):
                tokens.add_metric([usage.tenant, kind], count)
        yield requests
        yield tokens


def _labelled(usages: list[TenantUsage]) -> list[TenantUsage]:
    """The order is that of arrival and never changes, so no series ever goes back."""
    rest = [msgspec.structs.replace(usage, tenant=OTHERS, hours=[]) for usage in usages[MAX_LABELS:]]
    return usages[:MAX_LABELS] + merged([rest])
