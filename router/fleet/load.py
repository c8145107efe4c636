"""What a worker has to do: what this router gave it, counted at once, and what others gave it, as of its last status.

Pure: the clock is passed in. Shared by the live router and by what drives the placement policy in virtual time.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from tandem.common.fairness import LAST_BAND
from tandem.common.slot_shares import LARGE, kept
from tandem.planner.perf_model import PerfModel

LOWEST = 2**31 - 1
"""The band after all others."""
NONE: Mapping[int, int] = MappingProxyType({})


@dataclass(slots=True)
class TenantLoad:
    """Requests of one tenant and priority on a worker, of those that this router gave it."""

    weight: float
    requests: int = 0


@dataclass(slots=True)
class BandLoad:
    """What requests of one priority take of a worker, of those that this router gave it."""

    requests: int = 0
    waiting_s: float = 0.0
    reserved_tokens: int = 0
    tenants: dict[str, TenantLoad] = field(default_factory=dict)
    """None is without requests."""


@dataclass(slots=True)
class Stalls:
    """How prompts that were computed on a worker have held up those that decode there, in about the last `life_s`
    seconds: they come at random, so many small ones spread less than a few long ones."""

    at: float = 0.0
    count: float = 0.0
    seconds: float = 0.0
    squares: float = 0.0

    def add(self, now: float, life_s: float, stall_s: float) -> None:
        """Counts one of `stall_s`; older ones fade with `life_s`."""
        left = self._left(now, life_s)
        self.count = left * self.count + 1.0
        self.seconds = left * self.seconds + stall_s
        self.squares = left * self.squares + stall_s * stall_s
        self.at = max(self.at, now)

    def count_in(self, now: float, life_s: float) -> float:
        """Stalls in the life of a request."""
        return self._left(now, life_s) * self.count

    def total_s(self, now: float, life_s: float, more_s: float, deviations: float) -> float:
        """Seconds that a request loses in its life, with one more stall of `more_s`; `deviations` above the mean."""
        left = self._left(now, life_s)
        spread_s = math.sqrt(left * self.squares + more_s * more_s)
        return left * self.seconds + more_s + deviations * spread_s

    def _left(self, now: float, life_s: float) -> float:
        return math.exp(-max(now - self.at, 0.0) / life_s) if life_s > 0.0 else 0.0


@dataclass(slots=True)
class WorkerLoad:
    """Load of one start of one worker. Read by `placement.place`, changed by `Work` and `foreign`."""

    model: PerfModel
    slot: int
    """Its place in the prefix index."""
    capacity_tokens: int
    """KV that fits; 0: unknown, never full."""
    max_requests: int
    """Requests in its batch at one time; 0: unknown, never full."""
    name: str = ""
    """The worker's id, for people."""
    host: str = ""
    """Id of the host that it runs on; empty where that is unknown."""
    store_node: str = ""
    """Its home node in the KV store; empty without a store."""
    requests: int = 0
    """Placed and not over."""
    waiting: int = 0
    """Prompts among them that it has to compute and has not yet."""
    waiting_tokens: int = 0
    """Tokens of those prompts, cached or not."""
    waiting_s: float = 0.0
    """Estimated time to compute them."""
    busy_until: float = 0.0
    """When it will have computed them, by the clock that is passed in."""
    decoding: int = 0
    """Requests that produce tokens."""
    kv_tokens: int = 0
    """Prompt and output so far of all `requests`: what a decode step reads, or will before long."""
    reserved_tokens: int = 0
    """KV that they take up beyond what was cached, with the output that is still to come."""
    bands: dict[int, BandLoad] = field(default_factory=dict)
    """Requests by priority; none is without requests."""
    foreign_bands: Mapping[int, int] = field(default_factory=dict)
    """Requests of other routers by priority, as far as known."""
    foreign_requests: int = 0
    foreign_decoding: int = 0
    foreign_s: float = 0.0
    foreign_tokens: int = 0
    stalls: Stalls = field(default_factory=Stalls)

    @property
    def batch(self) -> int:
        """Requests that decode, or will before long."""
        return self.requests + self.foreign_requests

    @property
    def handed_over(self) -> int:
        """This router's requests that will decode here once a prefill worker has computed their prompt."""
        return max(self.requests - self.waiting - self.decoding, 0)

    def batch_before(self, priority: int) -> int:
        """Those of `batch` that a request of `priority` cannot displace."""
        return (
            self.batch
            - sum([band.requests for value, band in self.bands.items() if value > priority])
            - round(self.foreign_requests * self._foreign_later(priority))
        )

    def has_band(self, priority: int) -> bool:
        """Whether requests of `priority` are there, of any router."""
        return priority in self.bands or priority in self.foreign_bands

    def wait_s(self, now: float, priority: int = LOWEST) -> float:
        """Until a prompt that arrives now has its turn.

        Work drains with the clock, but a worker that is slower than estimated is not idle: of n prompts that wait, at
        most one is nearly done. Prompts of later bands let it pass.
        """
        foreign_s = self.foreign_s * (1.0 - self._foreign_later(priority))
        if not self.waiting:
            return foreign_s
        left = self.waiting_s * (self.waiting - 1) / self.waiting
        own_s = max(self.busy_until - now, left)
        later_s = sum([band.waiting_s for value, band in self.bands.items() if value > priority])
        return min(own_s, max(self.waiting_s - later_s, 0.0)) + foreign_s if later_s else own_s + foreign_s

    def has_room(self, tokens: int, slack: int, priority: int = LOWEST) -> bool:
        """Whether a prompt of `tokens` would not just wait for others to end. `slack`: requests beyond a full batch
        that may wait there, so that a place does not stay empty. Later bands are displaced."""
        batch = self.batch_before(priority)
        if not batch:
            return True
        if self.max_requests and batch >= self.max_requests + slack:
            return False
        if not self.capacity_tokens:
            return True
        later = sum([band.reserved_tokens for value, band in self.bands.items() if value > priority])
        foreign = self.foreign_tokens * (1.0 - self._foreign_later(priority))
        return self.reserved_tokens - later + foreign + tokens <= self.capacity_tokens

    def yields_to(self, tenant: str, weight: float, priority: int) -> bool:
        """Whether a request of `tenant` would get a slot that somebody with far more of them has
        (`common/slot_shares.py`). Other routers' requests are taken for those of one tenant."""
        if priority == LAST_BAND:
            return False
        band = self.bands.get(priority)
        holders = dict(band.tenants) if band is not None else {}
        mine = holders.pop(tenant, None)
        if foreign := self.foreign_bands.get(priority, 0):
            holders[""] = TenantLoad(1.0, foreign)
        least = kept(mine.requests / weight if mine is not None else 0.0, weight)
        return any(
            each.requests > self.max_requests / LARGE and (each.requests - 1) / each.weight >= least
            for each in holders.values()
        )

    def _foreign_later(self, priority: int) -> float:
        """The share of other routers' requests that are of later bands."""
        total = sum(self.foreign_bands.values()) if self.foreign_bands else 0
        return sum([count for value, count in self.foreign_bands.items() if value > priority]) / total if total else 0.0

    def foreign(
        self, *, requests: int, decoding: int, pending_tokens: int, used_tokens: int, by_band: Mapping[int, int] = NONE
    ) -> None:
        """What the worker reports beyond what this router knows: the work of other routers. `by_band`: all requests on
        the worker by priority."""
        self.foreign_bands = {
            value: count - mine
            for value, count in by_band.items()
            if count > (mine := band.requests if (band := self.bands.get(value)) is not None else 0)
        }
        self.foreign_requests = requests
        self.foreign_decoding = decoding
        self.foreign_s = self.model.prefill_s(pending_tokens)
        self.foreign_tokens = used_tokens


@dataclass(slots=True, eq=False)
class Work:
    """One request on one worker: `start`, then perhaps `computed`, then `produced` any number of times, then `end`."""

    load: WorkerLoad
    prompt_tokens: int
    output_tokens: int
    """Expected; 0 on a prefill worker."""
    prefill_s: float
    """Estimated, of the part that this worker computes; 0 where it is sent the KV."""
    cached_tokens: int = 0
    """Tokens of the prompt that this worker has: they take up no further room."""
    priority: int = 0
    tenant: str = ""
    weight: float = 1.0
    """The tenant's."""
    stall_s: float = 0.0
    """Time by which it holds up each request that decodes there, while its prompt is computed."""
    produced_tokens: int = 0
    _waits: bool = field(default=False, init=False)
    _decodes: bool = field(default=False, init=False)
    _over: bool = field(default=False, init=False)
    _band: BandLoad = field(default_factory=BandLoad, init=False)

    def start(self, now: float) -> None:
        """Counts the request, and where its prompt is to be computed here the time of that. `now`: s, monotonic."""
        load = self.load
        self._band = load.bands.setdefault(self.priority, BandLoad())
        self._band.requests += 1
        self._band.tenants.setdefault(self.tenant, TenantLoad(self.weight)).requests += 1
        self._band.reserved_tokens += self._reserved
        load.requests += 1
        load.reserved_tokens += self._reserved
        load.kv_tokens += self.prompt_tokens
        if self.prefill_s > 0.0:
            self._waits = True
            load.waiting += 1
            load.waiting_tokens += self.prompt_tokens
            load.waiting_s += self.prefill_s
            self._band.waiting_s += self.prefill_s
            load.busy_until = max(load.busy_until, now) + self.prefill_s
        if self.stall_s > 0.0:
            life_s = self.output_tokens * load.model.decode_step_s(load.batch, load.kv_tokens)
            load.stalls.add(now, life_s, self.stall_s)

    def computed(self, now: float) -> None:
        """The first token is there. Idempotent."""
        if self._over or self._decodes:
            return
        self._computed(now)
        self._decodes = True
        self.load.decoding += 1

    def produced(self, tokens: int) -> None:
        """Counts `tokens` of output; more than were expected take up room of their own."""
        self.produced_tokens += tokens
        self.load.kv_tokens += tokens
        more = self.produced_tokens - self.output_tokens
        if more > 0:
            self.output_tokens += more
            self.load.reserved_tokens += more
            self._band.reserved_tokens += more

    def end(self, now: float) -> None:
        """Idempotent."""
        if self._over:
            return
        self._computed(now)
        self._over = True
        load = self.load
        self._band.requests -= 1
        mine = self._band.tenants[self.tenant]
        mine.requests -= 1
        if not mine.requests:
            del self._band.tenants[self.tenant]
        self._band.reserved_tokens -= self._reserved
        if not self._band.requests:
            del load.bands[self.priority]
        load.requests -= 1
        load.reserved_tokens -= self._reserved
        load.kv_tokens -= self.prompt_tokens + self.produced_tokens
        load.decoding -= self._decodes

    @property
    def _reserved(self) -> int:
        return self.prompt_tokens - self.cached_tokens + self.output_tokens

    def _computed(self, now: float) -> None:
        if self._waits:
            self._waits = False
            load = self.load
            load.waiting -= 1
            load.waiting_tokens -= self.prompt_tokens
            self._band.waiting_s = max(0.0, self._band.waiting_s - self.prefill_s)
            load.waiting_s = max(0.0, load.waiting_s - self.prefill_s) if load.waiting else 0.0
            load.busy_until = now + load.waiting_s
