"""Who may start now: a bounded fair queue before the workers. Callbacks only, no task and no timer per request.

The workers' own queues stay short, so that the order is decided here, where all tenants are seen. A request starts at
once where nobody waits and a worker has room. `Service` calls `pump` when a request ends, when a worker's status comes
and from a timer. Used on the event loop only; `clock` is passed in.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from tandem.common.errors import TandemError
from tandem.common.fair_queue import QUANTUM, FairQueue
from tandem.common.fairness import INPUT_COST, OUTPUT_COST, AccountKey, ServiceCounters
from tandem.router.fleet.load import LOWEST
from tandem.router.turns.elders import Elders

MAX_GRANTS = 32
"""Requests started by one `pump`: about 10 ms of placements, then the event loop gets its turn."""
MAX_RETRY_AFTER_S = 30.0
HOLD_S = 0.25
"""A router whose next request is a quantum ahead of those who wait at other routers, or came long after one of its own
tenant there, leaves the room to them; after so long with room that nobody took, it takes it."""
_WINDOW_S = 1.0
_NEWCOMER = ""
"""A tenant that has nothing: nobody's claim is better."""


@dataclass(slots=True, eq=False)
class Waiting:
    """One request before the workers, and afterwards what its tenant is charged through."""

    tenant: str
    weight: float
    priority: int
    """Its band: lower goes first."""
    prompt_tokens: int
    deadline: float
    """Time after which it is refused, on the clock of `Admission`."""
    cached_tokens: Callable[[], int]
    """Prompt tokens that some worker holds now. Called a few times while the request waits: bounded and quick."""
    granted: Callable[[], None]
    """Start it now. A TandemError that it raises goes to `refused`, or to the caller of `submit`."""
    refused: Callable[[TandemError], None]
    """It will not start."""
    waited_s: float = 0.0
    """Time in the queue, once it is granted."""
    charged_tokens: int = 0
    """Prompt tokens charged so far."""
    arrived: float = 0.0


class Admission:
    """The queue before the workers. On the event loop; grants and refusals come as calls to `Waiting`."""

    def __init__(
        self,
        counters: ServiceCounters,
        *,
        max_requests: int,
        max_tokens: int,
        room: Callable[[int, int], bool],
        wait_s: Callable[[int], float],
        claims: Callable[[str, float, int], bool] = lambda tenant, weight, priority: False,
        ttft_slo_s: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`room(prompt_tokens, priority)`: a worker can take such a request without letting it wait; it may displace
        those of later bands. `wait_s(priority)`: the shortest wait of a new prompt on any worker.
        `claims(tenant, weight, priority)`: a worker would give it a slot of a tenant with far more. `ttft_slo_s`: see
        RouterConfig."""
        self.granted = 0
        self.queued = 0
        """Granted requests that had to wait."""
        self.refused: Counter[str] = Counter()
        """Refused requests by reason: full, displaced, slo, deadline, unavailable."""
        self._counters = counters
        self._max_requests = max_requests
        self._max_tokens = max_tokens
        self._room = room
        self._wait_s = wait_s
        self._claims = claims
        self._ttft_slo_s = math.inf if ttft_slo_s is None else ttft_slo_s
        self._clock = clock
        self._queue: FairQueue[Waiting] = FairQueue(counters, _cached_tokens)
        self.elders = Elders(self._oldest, clock)
        self._tokens = 0
        self._backlogs: dict[int, dict[str, _Backlog]] = {}
        self._rate = _Rate()
        self._pumping = False
        self._yields_since: float | None = None

    @property
    def waiting_requests(self) -> int:
        return len(self._queue)

    @property
    def waiting_tokens(self) -> int:
        return self._tokens

    @property
    def idle(self) -> bool:
        """Nobody waits and a worker has room: batch work may go ahead."""
        return not self._queue and self._room(0, LOWEST)

    def submit(self, waiting: Waiting) -> None:
        """Grants it now or later. Raises TandemError `overloaded` where the queue is full or the SLO out of reach."""
        waiting.arrived = now = self._clock()
        if not self._queue and self._fits(waiting):
            account = self._counters.enter(waiting.tenant, waiting.priority)
            self._counters.granted(waiting.priority, account.counter)
            self._start(waiting)
            return
        self._check_slo(waiting, now)
        for victim in self._victims(waiting):
            if self._drop(victim):
                self.refused["displaced"] += 1
                victim.refused(self._overloaded("the queue is full, and this request had to make room for another"))
        self._queue.push(waiting, waiting.tenant, waiting.priority)
        self._count(waiting, 1)
        self._rate.begin(now)
        self.pump()

    def cancel(self, waiting: Waiting) -> bool:
        """Takes it out of the queue; it hears nothing. False: it does not wait there."""
        return self._drop(waiting)

    def refuse_those(self, arrived_before: float, error: TandemError) -> None:
        """Refuses, with `error`, all that have waited since before `arrived_before` on the clock."""
        waiting = [
            each
            for band, tenants in self._backlogs.items()
            for tenant in tenants
            for each in self._queue.line(tenant, band)
        ]
        for late in [each for each in waiting if each.arrived <= arrived_before]:
            if self._drop(late):
                self.refused["unavailable"] += 1
                late.refused(error)

    def pump(self) -> bool:
        """Grants in fair order while there is room. True: it stopped early, call again soon."""
        if self._pumping or not self._queue:
            return False
        self._pumping = True
        try:
            for _ in range(MAX_GRANTS):
                if not self._queue:
                    return False
                band = self._queue.first_band
                if not self._room(0, band) and not self._somebody_is_crowded_out(band):
                    self._yields_since = None
                    return False
                waiting = self._queue.pop(self._fits, self._is_crowded_out)
                if waiting is None:
                    return False
                self._count(waiting, -1)
                self._grant(waiting)
            return bool(self._queue)
        finally:
            self._pumping = False
            if not self._queue:
                self._rate.end()

    # What a request costs its tenant, once it is granted

    def computed(self, waiting: Waiting, uncached_tokens: int) -> None:
        """The prompt took `uncached_tokens` (0: it failed before): corrects the estimate that was charged."""
        self.charge(waiting, (uncached_tokens - waiting.charged_tokens) * INPUT_COST)
        waiting.charged_tokens = uncached_tokens

    def produced(self, waiting: Waiting, tokens: int) -> None:
        self.charge(waiting, tokens * OUTPUT_COST)

    def charge(self, waiting: Waiting, cost: float) -> None:
        """`cost` in prompt tokens' worth, such as the loading of an adapter."""
        self._counters.charge(waiting.tenant, waiting.priority, cost, waiting.weight)

    # Inside

    def _fits(self, waiting: Waiting) -> bool:
        if not self._room(waiting.prompt_tokens, waiting.priority) and not self._is_crowded_out(waiting):
            self._yields_since = None
            return False
        if self._counters.ahead(waiting.tenant, waiting.priority) > QUANTUM or self._elders_go_first(waiting):
            now = self._clock()
            if self._yields_since is None:
                self._yields_since = now
            if now - self._yields_since < HOLD_S:
                return False
            self._counters.ignore_elsewhere()
            self.elders.pass_over()
        self._yields_since = None
        return True

    def _elders_go_first(self, waiting: Waiting) -> bool:
        oldest = self._queue.oldest(waiting.tenant, waiting.priority) or waiting
        return self.elders.go_first((waiting.priority, waiting.tenant), oldest.arrived)

    def _oldest(self) -> Iterator[tuple[AccountKey, float]]:
        for band in self._backlogs:
            for waiting in self._queue.heads(band):
                yield (band, waiting.tenant), waiting.arrived

    def _is_crowded_out(self, waiting: Waiting) -> bool:
        """Its tenant has far fewer slots of a worker than another one."""
        return self._claims(waiting.tenant, waiting.weight, waiting.priority)

    def _somebody_is_crowded_out(self, band: int) -> bool:
        return self._claims(_NEWCOMER, math.inf, band) and any(map(self._is_crowded_out, self._queue.heads(band)))

    def _grant(self, waiting: Waiting) -> None:
        now = self._clock()
        if now >= waiting.deadline:
            self.refused["deadline"] += 1
            waiting.refused(TandemError("deadline_exceeded", "the request's time ran out while it waited for a worker"))
            return
        waiting.waited_s = now - waiting.arrived
        self.queued += 1
        self._rate.note(now, waiting.prompt_tokens)
        try:
            self._start(waiting)
        except TandemError as error:
            waiting.refused(error)

    def _start(self, waiting: Waiting) -> None:
        waiting.charged_tokens = max(waiting.prompt_tokens - waiting.cached_tokens(), 0)
        self.charge(waiting, waiting.charged_tokens * INPUT_COST)
        self.granted += 1
        try:
            waiting.granted()
        except TandemError:
            self.computed(waiting, 0)
            raise

    def _drop(self, waiting: Waiting) -> bool:
        if not self._queue.remove(waiting, waiting.tenant, waiting.priority):
            return False
        self._count(waiting, -1)
        return True

    def _count(self, waiting: Waiting, sign: int) -> None:
        """One request more (1) or less (-1) in the queue."""
        self._tokens += sign * waiting.prompt_tokens
        tenants = self._backlogs.setdefault(waiting.priority, {})
        backlog = tenants.setdefault(waiting.tenant, _Backlog())
        backlog.requests += sign
        backlog.tokens += sign * waiting.prompt_tokens
        backlog.share += sign * self._share(waiting)
        if not backlog.requests:
            del tenants[waiting.tenant]
            if not tenants:
                del self._backlogs[waiting.priority]

    def _check_slo(self, waiting: Waiting, now: float) -> None:
        """Counts only what is certainly before it: the workers' queues, higher bands, and its own tenant's requests."""
        limit_s = min(self._ttft_slo_s, waiting.deadline - now)
        if math.isinf(limit_s):
            return
        before = sum(
            backlog.tokens
            for band, tenants in self._backlogs.items()
            for tenant, backlog in tenants.items()
            if band < waiting.priority or (band == waiting.priority and tenant == waiting.tenant)
        )
        wait_s = self._wait_s(waiting.priority) + (before / self._rate.tokens_per_s if before else 0.0)
        if wait_s > limit_s:
            self.refused["slo"] += 1
            raise TandemError(
                "overloaded",
                f"the first token would take at least {wait_s:.1f} s, more than the {limit_s:.1f} s that it may take; "
                "try again later",
                retry_after_s=_retry_after(wait_s - limit_s),
            )

    def _victims(self, waiting: Waiting) -> list[Waiting]:
        """Who has to leave the full queue for it. Raises TandemError `overloaded` where it is the one to stay out.

        The last requests of lower bands go first, those of the tenant with the largest share of the queue before
        others; then, in its own band, those of tenants with a larger share than its own (per weight). So one tenant
        cannot fill the queue against the others.
        """
        requests = len(self._queue) + 1 - self._max_requests
        tokens = self._tokens + waiting.prompt_tokens - self._max_tokens
        if not self._queue or (requests <= 0 and tokens <= 0):
            return []
        victims: list[Waiting] = []
        for band in sorted(self._backlogs, reverse=True):
            if band < waiting.priority or (requests <= 0 and tokens <= 0):
                break
            shares = {tenant: backlog.share for tenant, backlog in self._backlogs[band].items()}
            lines: dict[str, list[Waiting]] = {}
            own = self._share(waiting)
            if band == waiting.priority:
                own += shares.pop(waiting.tenant, 0.0)
            while shares and (requests > 0 or tokens > 0):
                tenant = max(shares, key=shares.__getitem__)
                if band == waiting.priority and shares[tenant] <= own:
                    break
                if tenant not in lines:
                    lines[tenant] = self._queue.line(tenant, band)
                line = lines[tenant]
                victim = line.pop()
                victims.append(victim)
                requests -= 1
                tokens -= victim.prompt_tokens
                shares[tenant] -= self._share(victim)
                if not line:
                    del shares[tenant]
        if requests > 0 or (tokens > 0 and len(victims) < len(self._queue)):
            self.refused["full"] += 1
            raise self._overloaded(f"{len(self._queue)} requests ({self._tokens} prompt tokens) are waiting already")
        return victims

    def _share(self, waiting: Waiting) -> float:
        """Share of the queue's requests and tokens that one request takes, per weight of its tenant."""
        return (1 / self._max_requests + waiting.prompt_tokens / self._max_tokens) / waiting.weight

    def _overloaded(self, reason: str) -> TandemError:
        wait_s = self._tokens / self._rate.tokens_per_s
        return TandemError("overloaded", f"{reason}; try again later", retry_after_s=_retry_after(wait_s))


@dataclass(slots=True)
class _Backlog:
    """What one tenant has in one band of the queue."""

    requests: int = 0
    tokens: int = 0
    share: float = 0.0
    """Share of the queue's requests and tokens, per weight of the tenant."""


class _Rate:
    """Prompt tokens granted per second while requests wait: the better of the last two windows, for estimates that
    should rather be too short. Infinite until the first window of a backlog has passed."""

    def __init__(self) -> None:
        self.tokens_per_s = math.inf
        self._last = 0.0
        self._since: float | None = None
        self._tokens = 0

    def begin(self, now: float) -> None:
        if self._since is None:
            self._since, self._tokens = now, 0

    def end(self) -> None:
        self._since = None
        self._last = 0.0
        self.tokens_per_s = math.inf

    def note(self, now: float, tokens: int) -> None:
        """Counts prompt tokens that were granted at `now` (seconds), and closes the window when it is long enough."""
        self._tokens += tokens
        if self._since is not None and now - self._since >= _WINDOW_S:
            rate = self._tokens / (now - self._since)
            self.tokens_per_s = max(rate, self._last)
            self._last = rate
            self._since, self._tokens = now, 0


def _cached_tokens(waiting: Waiting) -> int:
    return waiting.cached_tokens()


def _retry_after(seconds: float) -> float:
    return float(min(max(math.ceil(seconds), 1), MAX_RETRY_AFTER_S))
