"""What router replicas share through Redis: service counters and rate-limit buckets, a tenth of a second old at most.

Nothing waits for Redis. Every replica works with its own view; `SharedService` exchanges in the background: it sends
what happened here since the last time and gets the totals. Service counters and buckets are both numbers that only two
things happen to, "add a" and "become at least l" (a bucket is the time at which it will be full), so what happened to
one is a pair, and pairs of several replicas can be applied in any order.

Every batch has a number, and Redis applies a number once: a reply that was lost is asked for again without counting
twice. Where Redis has forgotten our last number it came back empty or old; then everything is said again. While it is
away each replica goes on alone: counters are its own, buckets give each replica its share of the limit, and all that
happened meanwhile is added once when it is back.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import redis.asyncio
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

from tandem.common.errors import ConfigError
from tandem.common.fairness import Account, AccountKey, Changes, ServiceCounters
from tandem.router.limits import LocalBuckets

log = logging.getLogger(__name__)

INTERVAL_S = 0.1
TIMEOUT_S = 1.0
"""For one exchange. A Redis that takes longer counts as away."""
MAX_ENTRIES = 1000
"""Per exchange; more go in several."""
MAX_BUCKETS = 20_000
"""Kept here; beyond it full ones are forgotten. Only buckets in use are anything but full."""
_ROUNDING = 1e-9
_NEVER = -1e300

_EXCHANGE = """
-- KEYS: 1 last number of this replica, 2 replicas alive, 3 floors, 4 least counters, 5.. entries
-- ARGV: replica, number, (added, at_least) per entry, then (band, floor, least or '', 1 if somebody waits) per band
local time = redis.call('TIME')
local now = time[1] + time[2] / 1e6
local replica, number, entries = ARGV[1], tonumber(ARGV[2]), #KEYS - 4
local last = tonumber(redis.call('GET', KEYS[1]) or 0)
if last ~= number and last ~= number - 1 then
  return {'behind', last}
end
local function text(value) return string.format('%.17g', value) end

redis.call('SET', KEYS[1], number, 'EX', 86400)
redis.call('ZADD', KEYS[2], now, replica)
redis.call('ZREMRANGEBYSCORE', KEYS[2], '-inf', now - 5)
redis.call('EXPIRE', KEYS[2], 60)
local reply = {'ok', text(now), redis.call('ZCARD', KEYS[2]), {}, {}, {}}

for i = 1, entries do
  local value = tonumber(redis.call('GET', KEYS[4 + i]) or 0)
  if last ~= number then
    value = math.max(value + tonumber(ARGV[2 * i + 1]), tonumber(ARGV[2 * i + 2]))
    redis.call('SET', KEYS[4 + i], text(value), 'EX', 3600)
  end
  reply[4][i] = text(value)
end

local floors = {}
for i = 3 + 2 * entries, #ARGV, 4 do
  local name = ARGV[i] .. '|' .. replica
  floors[ARGV[i]] = tonumber(ARGV[i + 1])
  if ARGV[i + 2] == '' then
    redis.call('HDEL', KEYS[4], name)
  else
    redis.call('HSET', KEYS[4], name, text(now) .. ' ' .. ARGV[i + 2] .. ' ' .. ARGV[i + 3])
  end
end
local least, elsewhere = {}, {}
local all = redis.call('HGETALL', KEYS[4])
for i = 1, #all, 2 do
  local seen, value, waits = string.match(all[i + 1], '(%S+) (%S+) (%S+)')
  local band, who = string.match(all[i], '([^|]*)|(.*)')
  if tonumber(seen) < now - 1 then
    redis.call('HDEL', KEYS[4], all[i])
  else
    least[band] = math.min(least[band] or math.huge, tonumber(value))
    if who ~= replica and waits == '1' then
      elsewhere[band] = math.min(elsewhere[band] or math.huge, tonumber(value))
    end
  end
end
for band, value in pairs(elsewhere) do
  table.insert(reply[6], band)
  table.insert(reply[6], text(value))
end
local known = redis.call('HGETALL', KEYS[3])
for i = 1, #known, 2 do
  floors[known[i]] = math.max(floors[known[i]] or 0, tonumber(known[i + 1]))
end
if #known > 2048 then
  redis.call('DEL', KEYS[3])
end
for band, value in pairs(floors) do
  if least[band] then value = math.max(value, least[band]) end
  if #known <= 2048 or least[band] then
    redis.call('HSET', KEYS[3], band, text(value))
    table.insert(reply[5], band)
    table.insert(reply[5], text(value))
  end
end
redis.call('EXPIRE', KEYS[3], 86400)
redis.call('EXPIRE', KEYS[4], 60)
return reply
"""


class SharedBuckets:
    """The `Buckets` of `limits.Limits`, shared. Within one exchange interval each replica may still give what the
    others have given already; that is counted, and everybody waits the longer for it."""

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self.alone = True
        """Redis is away, or has not been met yet."""
        self.replicas = 1
        """Known to be alive, this one among them."""
        self.ahead_s = 0.0
        """What the clock of Redis shows more than ours: buckets are on that one."""
        self._clock = clock
        self._accounts: dict[str, Account] = {}
        self._share = LocalBuckets(clock)

    def __len__(self) -> int:
        return len(self._accounts)

    def take(self, key: str, amount: float, rate: float, burst: float) -> float:
        if self._divided:
            wait_s = self._share.take(key, amount, rate / self.replicas, burst / self.replicas)
            if wait_s == 0.0:
                self._account(key).charge(amount / rate)
            return wait_s
        account = self._account(key)
        missing = min(amount, burst) - (burst - (account.counter - self._now()) * rate)
        if missing > _ROUNDING * burst:
            return missing / rate
        account.charge(amount / rate)
        return 0.0

    def add(self, key: str, amount: float, rate: float, burst: float) -> None:
        if self._divided:
            self._share.add(key, amount, rate / self.replicas, burst / self.replicas)
        self._account(key).charge(-amount / rate)

    def level(self, key: str, rate: float, burst: float) -> float:
        if self._divided:
            return self._share.level(key, rate / self.replicas, burst / self.replicas)
        account = self._accounts.get(key)
        return burst - max(0.0, account.counter - self._now()) * rate if account is not None else burst

    @property
    def _divided(self) -> bool:
        return self.alone and self.replicas > 1

    def _now(self) -> float:
        return self._clock() + self.ahead_s

    def _account(self, key: str) -> Account:
        """It is full now at the earliest: what was full before earns nothing."""
        now = self._now()
        account = self._accounts.get(key)
        if account is None:
            if len(self._accounts) >= MAX_BUCKETS:
                self._accounts = {
                    each: bucket for each, bucket in self._accounts.items() if bucket.changed or bucket.counter > now
                }
            account = self._accounts[key] = Account((0, key), now)
        account.lift(now)
        return account

    # For SharedService

    def take_changes(self) -> dict[str, tuple[float, float]]:
        now = self._now()
        return {key: bucket.take() for key, bucket in self._accounts.items() if bucket.changed or bucket.counter > now}

    def put_back(self, taken: Mapping[str, tuple[float, float]]) -> None:
        for key, bucket in self._accounts.items():
            bucket.put_back(*taken.get(key, (0.0, -math.inf)))

    def merge(self, totals: Mapping[str, float]) -> None:
        for key, total in totals.items():
            if (bucket := self._accounts.get(key)) is not None:
                bucket.merge(total)


@dataclass(frozen=True, slots=True)
class _Batch:
    """One numbered exchange. Kept until Redis has answered it."""

    number: int
    service: dict[AccountKey, tuple[float, float]]
    buckets: dict[str, tuple[float, float]]
    least: dict[int, float]
    waiting: frozenset[int]


class SharedService:
    """`start` on the event loop, `close` at the end. Raises ConfigError for a URL that redis-py does not read."""

    def __init__(
        self,
        url: str,
        counters: ServiceCounters,
        *,
        prefix: str = "tandem",
        interval_s: float = INTERVAL_S,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Replicas with the same `prefix` share."""
        self.counters = counters
        self.buckets = SharedBuckets(clock)
        self.exchanges = 0
        self.failures = 0
        self.resets = 0
        """Times that Redis came back without what it knew."""
        try:
            self._redis = redis.asyncio.Redis.from_url(
                url, socket_timeout=TIMEOUT_S, socket_connect_timeout=TIMEOUT_S, retry=Retry(NoBackoff(), 0)
            )
        except ValueError as error:
            raise ConfigError(f"--redis {url!r}: {error}; such as redis://HOST:PORT/DB") from error
        self._script = self._redis.register_script(_EXCHANGE)
        self._prefix = f"{{{prefix}}}:"
        self._interval_s = interval_s
        self._clock = clock
        self._replica = secrets.token_hex(8)
        self._number = 1
        self._published: set[int] = set()
        """Bands for which the others know a least counter of ours."""
        self._unanswered: list[_Batch] = []
        self._task: asyncio.Task[None] | None = None

    @property
    def connected(self) -> bool:
        return not self.buckets.alone

    def start(self) -> None:
        self._task = asyncio.create_task(self._run(), name="shared-service")

    async def close(self) -> None:
        """Says what is left to say, if Redis listens."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        if self.connected:
            with contextlib.suppress(RedisError, OSError, TimeoutError):
                await self.exchange()
        await self._redis.aclose()

    async def exchange(self) -> None:
        """One round. Raises RedisError, OSError or TimeoutError; what was not answered is sent again next time."""
        if not self._unanswered:
            self._unanswered = self._take()
        while self._unanswered:
            batch = self._unanswered[0]
            sent = self._clock()
            async with asyncio.timeout(TIMEOUT_S):
                reply = await self._script(*self._message(batch))
            if reply[0] == b"behind":
                self._begin_again(int(reply[1]))
                return
            self._unanswered.pop(0)
            self._number = batch.number + 1
            self.buckets.ahead_s = float(reply[1]) - (sent + self._clock()) / 2
            self.buckets.replicas = max(1, int(reply[2]))
            totals = list(map(float, reply[3]))
            self.counters.merge(dict(zip(batch.service, totals, strict=False)), _bands(reply[4]), _bands(reply[5]))
            self.buckets.merge(dict(zip(batch.buckets, totals[len(batch.service) :], strict=True)))
        self.exchanges += 1
        self._set_alone(False)

    async def _run(self) -> None:
        while True:
            try:
                await self.exchange()
            except (RedisError, OSError, TimeoutError) as error:
                self.failures += 1
                if self.connected:
                    log.warning("Redis is away, replicas share nothing until it is back: %s", error or type(error))
                self._set_alone(True)
            await asyncio.sleep(self._interval_s)

    def _set_alone(self, alone: bool) -> None:
        self.counters.alone = alone
        if alone:
            self.counters.ignore_elsewhere()
        self.buckets.alone = alone

    def _take(self) -> list[_Batch]:
        changes = self.counters.take_changes()
        service, buckets = list(changes.accounts.items()), list(self.buckets.take_changes().items())
        batches: list[_Batch] = []
        while service or buckets or not batches:
            some = service[:MAX_ENTRIES]
            others = buckets[: MAX_ENTRIES - len(some)]
            number = self._number + len(batches)
            batches.append(_Batch(number, dict(some), dict(others), changes.least, changes.waiting))
            service, buckets = service[len(some) :], buckets[len(others) :]
        return batches

    def _message(self, batch: _Batch) -> tuple[list[str], list[str | int | float]]:
        prefix = self._prefix
        keys = [f"{prefix}last:{self._replica}", f"{prefix}replicas", f"{prefix}floors", f"{prefix}least"]
        keys += [f"{prefix}service:{band}:{tenant}" for band, tenant in batch.service]
        keys += [f"{prefix}bucket:{name}" for name in batch.buckets]
        args: list[str | int | float] = [self._replica, batch.number]
        for added, at_least in (*batch.service.values(), *batch.buckets.values()):
            args += [added, max(at_least, _NEVER)]
        for band in self._published | set(batch.least) | {band for band, _ in batch.service}:
            args += [band, self.counters.floor(band), batch.least.get(band, ""), int(band in batch.waiting)]
        self._published = set(batch.least)
        return keys, args

    def _begin_again(self, last: int) -> None:
        """Redis knows an older number than our last one: it lost what came after."""
        self.resets += 1
        log.warning("Redis came back without our last %d batches: saying everything again", self._number - 1 - last)
        self._number = last + 1
        service = {key: pair for batch in self._unanswered for key, pair in batch.service.items()}
        buckets = {key: pair for batch in self._unanswered for key, pair in batch.buckets.items()}
        self._unanswered = []
        self.counters.put_back(Changes(service, {}))
        self.buckets.put_back(buckets)


def _bands(flat: list[bytes]) -> dict[int, float]:
    return dict(zip(map(int, flat[::2]), map(float, flat[1::2]), strict=True))
