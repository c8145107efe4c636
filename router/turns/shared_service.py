"""What routers share through Redis: service counters, rate limits and requests in flight, a tenth of a second old.

Every router works with its own view; `SharedService` exchanges in the background: it sends what happened here since the
last time and gets the totals. Service counters and buckets are both numbers that only two things happen to, "add a" and
"become at least l", so what happened to one is a pair, and pairs of several routers can be applied in any order. Only a
request of a tenant with limits asks before it takes, and waits for the answer: a few milliseconds, HEAR_S at most.
What a router alone knows it writes in a row of its own (`neighbours.py`).

Every batch has a number, and Redis applies a number once: a reply that was lost is asked for again without counting
twice. Where Redis has forgotten our last number it came back empty or old; then everything is said again. While it is
away each router goes on alone: counters are its own, limits are divided, and all that happened meanwhile is added once
when it is back.

Redis is not trusted. A bucket cannot be further from full than all routers together can have emptied it, no counter can
be beyond what all have charged, or fall by more than others have corrected: what cannot be true is not taken, is
counted, and is replaced by what the routers know. `shared_script.py` reads nothing without a bound.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import secrets
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import redis.asyncio
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

from tandem.common.errors import ConfigError
from tandem.common.fairness import AccountKey, Changes, ServiceCounters
from tandem.common.patience import within
from tandem.common.redis_url import without_password
from tandem.router.turns import neighbours
from tandem.router.turns.elders import Elders
from tandem.router.turns.neighbours import (
    MAX_AGE_S,
    MAX_BANDS,
    MAX_ROUTERS,
    MAX_ROW_BYTES,
    MAX_SERVICE,
    Neighbours,
    Row,
)
from tandem.router.turns.shared_buckets import BucketChange, Places, SharedBuckets
from tandem.router.turns.shared_script import EXCHANGE

log = logging.getLogger(__name__)

INTERVAL_S = 0.1
PAUSE_S = 0.005
"""Pause between two exchanges, also where the others should hear of something soon."""
TIMEOUT_S = 1.0
"""Limit for one exchange, while the loop runs. A Redis that takes longer counts as away."""
MAX_ENTRIES = 1000
"""Entries of each kind per exchange; more go in several."""
DISAGREED_S = 60.0
_NEVER = -1e300
_FAULTS = (RedisError, OSError, TimeoutError, ValueError, TypeError, LookupError, ArithmeticError)
"""Faults of the connection, and of an answer that is not ours."""


@dataclass(frozen=True, slots=True)
class _Batch:
    """One numbered exchange. Kept until Redis has answered it."""

    number: int
    service: dict[AccountKey, tuple[float, float]]
    buckets: dict[str, BucketChange]
    places: dict[str, Places]
    """Requests in flight, by tenant."""
    changes: Changes


class SharedService:
    """`start` on the event loop, `close` at the end. Raises ConfigError for a URL that redis-py does not read."""

    def __init__(
        self,
        url: str,
        counters: ServiceCounters,
        *,
        prefix: str = "tandem",
        interval_s: float = INTERVAL_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Routers with the same `prefix` share. `clock`: seconds that never go back."""
        self.counters = counters
        self.buckets = SharedBuckets(clock)
        self.tenants: Callable[[], str] = lambda: ""
        """Fingerprint of those who may come in here."""
        self.elders = Elders(lambda: (), clock)
        """Those who wait here and elsewhere; `admission.Admission` has the real ones."""
        self.neighbours = Neighbours(clock)
        self.exchanges = 0
        self.failures = 0
        self.resets = 0
        """Times that Redis came back without what it knew."""
        self.refused = 0
        """Numbers that Redis held and that cannot be true."""
        try:
            self._redis = redis.asyncio.Redis.from_url(
                url, socket_timeout=None, socket_connect_timeout=None, retry=Retry(NoBackoff(), 0)
            )
        except ValueError as error:
            raise ConfigError(f"--redis {without_password(url)}: {error}; such as redis://HOST:PORT/DB") from error
        self._script = self._redis.register_script(EXCHANGE)
        self._prefix = f"{{{prefix}}}:"
        self._interval_s = interval_s
        self._clock = clock
        self._router = secrets.token_hex(8)
        self._number = 1
        self._changes = Changes({}, {})
        """The changes as last taken."""
        self._oldest: dict[AccountKey, float] = {}
        """Arrivals as last taken from `elders`."""
        self._anyhow = False
        """The next batch is taken whatever number Redis knows."""
        self._beat = 0
        self._heard_at = clock()
        self._disagreed_at: float | None = None
        self._unanswered: list[_Batch] = []
        self._wanted = asyncio.Event()
        self.buckets.wanted = self._wanted.set
        self._task: asyncio.Task[None] | None = None

    @property
    def connected(self) -> bool:
        return not self.buckets.alone

    @property
    def age_s(self) -> float:
        """Since the last exchange that succeeded, or since the start."""
        return self._clock() - self._heard_at

    def start(self) -> None:
        self._task = asyncio.create_task(self._run(), name="shared-service")

    async def close(self) -> None:
        """Says what is left to say, if Redis listens."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        if self.connected:
            with contextlib.suppress(*_FAULTS):
                await self.exchange()
        await self._redis.aclose()

    async def exchange(self, *, everything: bool = True) -> None:
        """One round; without `everything` only of limits that changed or are asked for. Raises one of `_FAULTS`; what
        was not answered is sent again next time."""
        try:
            await self._exchange(everything)
        finally:
            self.buckets.tell()

    async def _exchange(self, everything: bool) -> None:
        if not self._unanswered:
            self._unanswered = self._take(everything)
        while self._unanswered:
            batch = self._unanswered[0]
            sent = self._clock()
            reply = await within(TIMEOUT_S, self._script(*self._message(batch)))
            if reply[0] == b"behind":
                self._begin_again()
                return
            self._unanswered.pop(0)
            self._number = batch.number + 1
            self._anyhow = False
            rows = dict(zip(reply[1][::2], reply[1][1::2], strict=True))
            self._merge(batch, rows, list(map(float, reply[2])), list(map(float, reply[3])), (sent + self._clock()) / 2)
        self.exchanges += 1
        self._heard_at = self._clock()
        self._set_alone(False)

    def _merge(
        self, batch: _Batch, rows: dict[bytes, bytes], totals: list[float], granted: list[float], at: float
    ) -> None:
        """`at`: when Redis answered, on our clock."""
        others, counters = self.neighbours, self.counters
        charged = others.charged
        others.hear(rows)
        self.buckets.routers = others.alive + 1
        most = (counters.charged + others.charged) * (1 + 1e-6) + 1.0
        self.refused += counters.merge(
            dict(zip(batch.service, totals, strict=False)),
            others.floors(counters.floors(), batch.changes.least),
            others.waiting(),
            most=min(most, MAX_SERVICE),
            moved=max(0.0, others.charged - charged) + 1.0,
        )
        self.elders.hear(others.oldest())
        begin, end = len(batch.service), len(batch.service) + len(batch.buckets)
        pairs = list(zip(totals, granted, strict=True))
        self.buckets.merge(dict(zip(batch.buckets, pairs[begin:end], strict=True)), at)
        for tenant, (elsewhere, places) in zip(batch.places, pairs[end:], strict=True):
            self.buckets.place(tenant, int(elsewhere), int(places))
        self._watch_tenants(at)

    def _watch_tenants(self, now: float) -> None:
        """For a while routers may disagree: their files are changed one after the other."""
        if not self.neighbours.disagreeing(self.tenants()):
            self._disagreed_at = None
        elif self._disagreed_at is None:
            self._disagreed_at = now
        elif now - self._disagreed_at > DISAGREED_S:
            self._disagreed_at = math.inf  # said once, until they agree again
            log.warning(
                "routers share limits with this one and let in other tenants: give them the same tenants file, or, if "
                "they belong to another deployment, name both with --deployment"
            )

    async def _run(self) -> None:
        due = 0.0
        while True:
            now = self._clock()
            everything = now >= due
            if everything:
                due = now + self._interval_s
            try:
                await self.exchange(everything=everything)
            except _FAULTS as error:
                self.failures += 1
                if self.connected or self.failures == 1:
                    log.warning("Redis is away, routers share nothing until it is back: %s", error or type(error))
                self._set_alone(True)
                await asyncio.sleep(self._interval_s)
                continue
            await asyncio.sleep(min(PAUSE_S, self._interval_s))
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(max(0.0, due - self._clock())):
                    await self._wanted.wait()
            self._wanted.clear()

    def _set_alone(self, alone: bool) -> None:
        if self.buckets.alone and not alone:
            log.info("limits and fairness are shared through Redis as deployment %s", self._prefix.strip("{}:"))
        self.counters.alone = alone
        if alone:
            self.counters.ignore_elsewhere()
            self.elders.hear({})
        self.buckets.alone = alone

    def _take(self, everything: bool) -> list[_Batch]:
        if everything:
            self._changes = self.counters.take_changes()
            self._oldest = self.elders.here()
        changes = self._changes if everything else replace(self._changes, accounts={}, wrong=frozenset())
        service, buckets = list(changes.accounts.items()), list(self.buckets.take_changes(everything).items())
        places = list(self.buckets.take_places(everything).items())
        batches: list[_Batch] = []
        while service or buckets or places or not batches:
            number = self._number + len(batches)
            some, service = service[:MAX_ENTRIES], service[MAX_ENTRIES:]
            more, buckets = buckets[:MAX_ENTRIES], buckets[MAX_ENTRIES:]
            rest, places = places[:MAX_ENTRIES], places[MAX_ENTRIES:]
            batches.append(_Batch(number, dict(some), dict(more), dict(rest), changes))
        return batches

    def _message(self, batch: _Batch) -> tuple[list[str], list[str | bytes | int | float]]:
        prefix, now = self._prefix, self._clock()
        keys = [f"{prefix}last:{self._router}", f"{prefix}routers"]
        keys += [f"{prefix}service:{band}:{tenant}" for band, tenant in batch.service]
        keys += [f"{prefix}bucket:{name}" for name in batch.buckets]
        keys += [f"{prefix}running:{tenant}" for tenant in batch.places]
        useless = self.neighbours.useless()
        args: list[str | bytes | int | float] = [self._router, batch.number, int(self._anyhow), self._row(batch)]
        args += [MAX_ROUTERS, MAX_ROW_BYTES, len(useless), *useless]
        for key, (added, at_least) in batch.service.items():
            kind = "r" if key in batch.changes.wrong else "s"
            args += [kind, added, max(at_least, _NEVER), MAX_SERVICE, 0, 0]
        for change in batch.buckets.values():
            args += ["b", change.added_s, max(change.full_at - now, _NEVER), self.buckets.most_s(change)]
            args += [change.asked_s, change.fill_s]
        for places in batch.places.values():
            args += ["c", places.here, 0, places.most, places.asked, 0]
        return keys, args

    def _row(self, batch: _Batch) -> bytes:
        self._beat += 1
        counters, others, now = self.counters, self.neighbours, self._clock()
        return neighbours.encode(
            Row(
                beat=self._beat,
                charged=counters.charged,
                known=counters.charged + others.charged if others.settled else 0.0,
                floors=_first_bands(counters.floors()),
                least=(least := _first_bands(batch.changes.least)),
                waiting=batch.changes.waiting & least.keys(),
                oldest=tuple((*key, min(now - arrived, MAX_AGE_S)) for key, arrived in self._oldest.items()),
                tenants=self.tenants(),
            )
        )

    def _begin_again(self) -> None:
        """Redis does not know our last number: it lost what came after another one, or all."""
        self.resets += 1
        log.warning("Redis came back without our last batches: saying everything again")
        self._anyhow = True
        service = {key: pair for batch in self._unanswered for key, pair in batch.service.items()}
        buckets = {key: change for batch in self._unanswered for key, change in batch.buckets.items()}
        self._unanswered = []
        self.counters.put_back(Changes(service, {}))
        self.buckets.put_back(buckets)


def _first_bands(by_band: dict[int, float]) -> dict[int, float]:
    """Those that go first, as many as a row may have."""
    return by_band if len(by_band) <= MAX_BANDS else dict(sorted(by_band.items())[:MAX_BANDS])


class SharedCollector(Collector):
    """Prometheus metrics of a SharedService, read when asked."""

    def __init__(self, shared: SharedService) -> None:
        self._shared = shared

    def collect(self) -> Iterator[Metric]:
        """Gauges and counters of the exchange with Redis, in Prometheus' form."""
        shared = self._shared
        for name, text, value in (
            ("active", "1 while limits and fairness are shared through Redis, 0 while it is away", shared.connected),
            ("age_seconds", "Since Redis was last heard: so old is what is known of other routers", shared.age_s),
            ("routers", "Routers that share, this one among them", shared.buckets.routers),
        ):
            yield GaugeMetricFamily(f"tandem_router_shared_{name}", text, float(value))
        for name, text, value in (
            ("exchanges", "Exchanges with Redis", shared.exchanges),
            ("failures", "Exchanges that failed", shared.failures),
            ("resets", "Times that Redis came back without what it knew", shared.resets),
            ("refused", "Values in Redis that cannot be true", shared.refused + shared.neighbours.unreadable),
        ):
            yield CounterMetricFamily(f"tandem_router_shared_{name}", text, float(value))
