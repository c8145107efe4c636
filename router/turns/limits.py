"""Rate limits of tenants: requests and tokens a minute as token buckets, and requests in flight. Pure,
but for the wait in `hear_others`.

How many tokens a request will take is not known when it comes, so an estimate is taken and corrected when it ends. A
bucket may therefore go below zero; it then has to fill up again before the next request is let in. T seconds after its
first request a tenant has had at most `rate * T + burst`, plus what requests took beyond their estimates, which comes
off what it gets next. A burst is one minute's worth, or a single request that is larger.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from tandem.common.errors import TandemError
from tandem.router.tenants.caller import Caller

MINUTE_S = 60.0
FIRST_OUTPUT_GUESS = 256
"""Output tokens assumed of a tenant's first requests. `max_tokens` alone would not do: left out, it means the rest of
the context, and one such request would empty a bucket."""
GUESS_WEIGHT = 0.1
"""Weight of the latest request in the running mean of output tokens."""
CONCURRENCY_RETRY_S = 1.0
BYTES_PER_REQUEST = 64 * 1024
BYTES_PER_TOKEN = 64
"""What the router has read without sending it to a worker (a refused request, a text to be tokenized) costs, beside
one request, a request for so many bytes of it and a token for so many."""
HEAR_S = 2.0
"""A request waits for news of other routers no longer than that: with Redis at hand it is a few milliseconds, and after
a second without an answer Redis counts as away."""
MAX_STATES = 20_000
"""Tenants with a state; beyond it those at rest are forgotten. Only names that have left the file can be so many."""
_ROUNDING = 1e-9


class Buckets(Protocol):
    """Token buckets by name. Rate and burst come with each call, so that new limits hold at once."""

    def take(self, key: str, amount: float, rate: float, burst: float) -> float:
        """Takes it and returns 0, or takes nothing and returns the seconds until it could.

        A bucket that is full gives any amount, and goes below zero for what is larger than itself."""

    def add(self, key: str, amount: float, rate: float, burst: float) -> None:
        """Gives back; a negative amount takes without asking."""

    def level(self, key: str, rate: float, burst: float) -> float: ...

    def in_flight(self, tenant: str, here: int) -> int:
        """Requests of a tenant in flight at all routers that share, `here` of them at this one."""

    def set_in_flight(self, tenant: str, here: int) -> None:
        """A tenant has a limit on requests in flight: the others should know of its `here`."""

    def may_decide(self, key: str, amount: float, rate: float, burst: float) -> bool:
        """Whether what is known of the other routers is enough for `take`."""

    def ask(self, key: str, amount: float, rate: float, burst: float) -> None:
        """Notes that so much is wanted of the others by who then calls `hear`."""

    def may_start(self, tenant: str, here: int, most: int) -> bool:
        """Whether it is enough to let in one more of `most` requests in flight, or to refuse it."""

    def ask_to_start(self, tenant: str, most: int) -> None:
        """The same for one more request in flight."""

    async def hear(self, timeout_s: float) -> None:
        """Waits until more is known of the others, or `timeout_s`."""


class LocalBuckets:
    """Buckets of this process alone. A bucket is one number: when it will be full."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._full_at: dict[str, float] = {}

    def take(self, key: str, amount: float, rate: float, burst: float) -> float:
        """Takes `amount`, or tells the seconds until it could; see `Buckets`."""
        now = self._clock()
        full_at = max(now, self._full_at.get(key, now))
        missing = min(amount, burst) - (burst - (full_at - now) * rate)
        if missing > _ROUNDING * burst:
            return missing / rate
        self._set(key, full_at + amount / rate, now)
        return 0.0

    def add(self, key: str, amount: float, rate: float, burst: float) -> None:
        now = self._clock()
        self._set(key, max(now, self._full_at.get(key, now)) - amount / rate, now)

    def _set(self, key: str, full_at: float, now: float) -> None:
        if len(self._full_at) >= MAX_STATES:
            self._full_at = {each: at for each, at in self._full_at.items() if at > now}
        self._full_at[key] = full_at

    def level(self, key: str, rate: float, burst: float) -> float:
        now = self._clock()
        return burst - max(0.0, self._full_at.get(key, now) - now) * rate

    def in_flight(self, tenant: str, here: int) -> int:
        return here

    def set_in_flight(self, tenant: str, here: int) -> None:
        pass

    def may_decide(self, key: str, amount: float, rate: float, burst: float) -> bool:
        return True

    def ask(self, key: str, amount: float, rate: float, burst: float) -> None:
        pass

    def may_start(self, tenant: str, here: int, most: int) -> bool:
        return True

    def ask_to_start(self, tenant: str, most: int) -> None:
        pass

    async def hear(self, timeout_s: float) -> None:
        pass


class RateLimited(TandemError):
    """A TandemError `rate_limit_exceeded` that names the limit."""

    def __init__(self, limit: str, message: str, retry_after_s: float) -> None:
        super().__init__("rate_limit_exceeded", message, retry_after_s=retry_after_s)
        self.limit = limit
        """`requests`, `tokens` or `concurrency`."""


@dataclass(slots=True)
class _State:
    running: int = 0
    output_guess: float = FIRST_OUTPUT_GUESS


class Limits:
    """Tenants without a limit pass through at the cost of one test."""

    def __init__(self, buckets: Buckets) -> None:
        self._buckets = buckets
        self._states: dict[str, _State] = {}

    def enter(self, caller: Caller, *, tokens: bool = True) -> Place:
        """A request has come: a place in flight and one request; `Place.close` it. `tokens`: it will need some, so it
        is refused at once where there are none. Raises RateLimited, and then nothing is taken."""
        rates = caller.rates
        if rates.unlimited:
            return Place(self, caller, None, computes=tokens)
        state = self._state(caller.tenant)
        self._check_concurrency(caller, state.running)
        if tokens and rates.tokens_per_minute is not None:
            missing = 1.0 - self._level(caller, "tokens", rates.tokens_per_minute)
            if missing > _ROUNDING * rates.tokens_per_minute:
                wait_s = missing * MINUTE_S / rates.tokens_per_minute
                raise _exceeded(caller, "tokens", rates.tokens_per_minute, 1, wait_s)
        if rates.requests_per_minute is not None:
            self._take(caller, "requests", 1, rates.requests_per_minute)
        self._count(caller, state, 1)
        return Place(self, caller, state, computes=tokens)

    def reserve(self, caller: Caller, prompt_tokens: int, max_output_tokens: int) -> Reservation:
        """Tokens for what goes to the workers; `close` it. Raises RateLimited, and then nothing is taken."""
        rates = caller.rates
        if rates.unlimited:
            return Reservation(self, caller, None, 0)
        state = self._state(caller.tenant)
        estimate = _estimate(state, prompt_tokens, max_output_tokens)
        if rates.tokens_per_minute is not None:
            self._take(caller, "tokens", estimate, rates.tokens_per_minute)
        return Reservation(self, caller, state, estimate)

    async def hear_before_entering(self, caller: Caller) -> None:
        """Waits, where routers share limits, until it is known well enough what the others let in; no longer than
        HEAR_S. Takes nothing. Called before `enter`."""
        if not caller.rates.unlimited:
            await self._hear(lambda: self._may_enter(caller))

    async def hear_others(self, caller: Caller, prompt_tokens: int, max_output_tokens: int) -> None:
        """The same before `reserve`."""
        per_minute = caller.rates.tokens_per_minute
        if per_minute is not None:
            tokens = _estimate(self._state(caller.tenant), prompt_tokens, max_output_tokens)
            await self._hear(lambda: self._may_decide(caller, "tokens", tokens, per_minute))

    async def _hear(self, known: Callable[[], bool]) -> None:
        end = 0.0
        while not known():
            now = time.monotonic()
            end = end or now + HEAR_S
            if now >= end:
                return
            await self._buckets.hear(end - now)

    def _may_enter(self, caller: Caller) -> bool:
        """Asks for what is missing."""
        rates, buckets = caller.rates, self._buckets
        known = True
        if rates.max_concurrent is not None:
            known = buckets.may_start(caller.tenant, self.running(caller), rates.max_concurrent)
            if not known:
                buckets.ask_to_start(caller.tenant, rates.max_concurrent)
        if rates.requests_per_minute is not None:
            known = self._may_decide(caller, "requests", 1, rates.requests_per_minute) and known
        return known

    def _may_decide(self, caller: Caller, limit: str, amount: int, per_minute: int) -> bool:
        """Asks where it may not."""
        bucket = (_key(caller, limit), amount, per_minute / MINUTE_S, per_minute)
        known = self._buckets.may_decide(*bucket)
        if not known:
            self._buckets.ask(*bucket)
        return known

    def running(self, caller: Caller) -> int:
        """Its requests in flight at this router, counted where it has a limit of any kind."""
        state = self._states.get(caller.tenant)
        return state.running if state is not None else 0

    def headers(self, caller: Caller) -> list[tuple[bytes, bytes]]:
        """`x-ratelimit-*` as OpenAI writes them, for the limits that the tenant has."""
        rates = caller.rates
        found: list[tuple[bytes, bytes]] = []
        for limit, per_minute in (("requests", rates.requests_per_minute), ("tokens", rates.tokens_per_minute)):
            if per_minute is not None:
                level = self._level(caller, limit, per_minute)
                reset_s = max(0.0, per_minute - level) * MINUTE_S / per_minute
                found += [
                    (b"x-ratelimit-limit-" + limit.encode(), str(per_minute).encode()),
                    (
                        b"x-ratelimit-remaining-" + limit.encode(),
                        str(max(0, math.floor(level + _ROUNDING * per_minute))).encode(),
                    ),
                    (b"x-ratelimit-reset-" + limit.encode(), duration(reset_s).encode()),
                ]
        return found

    def _check_concurrency(self, caller: Caller, running: int) -> None:
        most = caller.rates.max_concurrent
        if most is not None and self._buckets.in_flight(caller.tenant, running) >= most:
            raise _concurrent(caller)

    def _count(self, caller: Caller, state: _State, change: int) -> None:
        state.running += change
        if caller.rates.max_concurrent is not None:
            self._buckets.set_in_flight(caller.tenant, state.running)

    def _take(self, caller: Caller, limit: str, amount: int, per_minute: int) -> None:
        wait_s = self._buckets.take(_key(caller, limit), amount, per_minute / MINUTE_S, per_minute)
        if wait_s > 0:
            raise _exceeded(caller, limit, per_minute, amount, wait_s)

    def _add(self, caller: Caller, limit: str, amount: float, per_minute: int) -> None:
        self._buckets.add(_key(caller, limit), amount, per_minute / MINUTE_S, per_minute)

    def _level(self, caller: Caller, limit: str, per_minute: int) -> float:
        return self._buckets.level(_key(caller, limit), per_minute / MINUTE_S, per_minute)

    def _state(self, tenant: str) -> _State:
        state = self._states.get(tenant)
        if state is None:
            if len(self._states) >= MAX_STATES:
                self._states = {name: state for name, state in self._states.items() if state.running}
            state = self._states[tenant] = _State()
        return state


class Place:
    """One request in flight, from its arrival to the end of its answer. `close` it whatever happens."""

    __slots__ = ("_caller", "_charged", "_computes", "_limits", "_state")

    def __init__(self, limits: Limits, caller: Caller, state: _State | None, *, computes: bool) -> None:
        """`computes`: it goes to a worker, unless it is refused; else it costs by its size in any case."""
        self._limits = limits
        self._caller = caller
        self._state = state
        self._computes = computes
        self._charged = 0
        """Bytes."""

    def has_read(self, size: int) -> None:
        """A large body is there. Raises RateLimited where others that came meanwhile have taken what was left."""
        self._check()
        if not self._computes:
            self.charge(size)

    def begin(self) -> None:
        """What is in it will be looked at now. For any thread. Raises RateLimited, see `has_read`."""
        if self._computes:
            self._check()

    def charge(self, size: int) -> None:
        """Charges bytes that were read, and not for a worker. Each is charged once, however often it is called."""
        rates = self._caller.rates
        if self._state is None:
            return
        size, self._charged = size - self._charged, size
        if rates.requests_per_minute is not None and size >= BYTES_PER_REQUEST:
            self._limits._add(self._caller, "requests", -(size // BYTES_PER_REQUEST), rates.requests_per_minute)
        if rates.tokens_per_minute is not None:
            self._limits._add(self._caller, "tokens", -(size // BYTES_PER_TOKEN), rates.tokens_per_minute)

    def _check(self) -> None:
        rates = self._caller.rates
        for limit, per_minute in (("requests", rates.requests_per_minute), ("tokens", rates.tokens_per_minute)):
            if self._state is not None and per_minute is not None:
                missing = -self._limits._level(self._caller, limit, per_minute)
                if missing > _ROUNDING * per_minute:
                    raise _exceeded(self._caller, limit, per_minute, 1, missing * MINUTE_S / per_minute)

    def give_back(self) -> None:
        """It was refused for want of tokens: then it takes no request either."""
        per_minute = self._caller.rates.requests_per_minute
        if self._state is not None and per_minute is not None:
            self._limits._add(self._caller, "requests", 1, per_minute)

    def close(self) -> None:
        """Idempotent."""
        if self._state is not None:
            self._limits._count(self._caller, self._state, -1)
            self._state = None


class Reservation:
    """`settle` with what the request took, then `close`. Closing without settling gives all tokens back."""

    __slots__ = ("_actual", "_caller", "_closed", "_estimate", "_limits", "_state")

    def __init__(self, limits: Limits, caller: Caller, state: _State | None, estimate: int) -> None:
        self._limits = limits
        self._caller = caller
        self._state = state
        self._estimate = estimate
        self._actual = 0
        self._closed = False

    def settle(self, prompt_tokens: int, completion_tokens: int) -> None:
        self._actual = prompt_tokens + completion_tokens
        if self._state is not None:
            self._state.output_guess += GUESS_WEIGHT * (completion_tokens - self._state.output_guess)

    def close(self) -> None:
        """Idempotent."""
        if self._closed or self._state is None:
            return
        self._closed = True
        per_minute = self._caller.rates.tokens_per_minute
        if per_minute is not None:
            self._limits._add(self._caller, "tokens", self._estimate - self._actual, per_minute)


def duration(seconds: float) -> str:
    """The time as OpenAI writes it: `0s`, `120ms`, `1.5s`, `6m0s`."""
    milliseconds = math.ceil(seconds * 1000 - 1e-6)
    if milliseconds < 1000:
        return f"{milliseconds}ms" if milliseconds > 0 else "0s"
    minutes, rest = divmod(milliseconds, 60_000)
    hours, minutes = divmod(minutes, 60)
    text = f"{rest / 1000:g}s"
    if hours:
        return f"{hours}h{minutes}m{text}"
    return f"{minutes}m{text}" if minutes else text


def _estimate(state: _State, prompt_tokens: int, max_output_tokens: int) -> int:
    return prompt_tokens + min(max_output_tokens, math.ceil(state.output_guess))


def _key(caller: Caller, limit: str) -> str:
    return f"{limit}:{caller.tenant}"


def _concurrent(caller: Caller) -> RateLimited:
    return RateLimited(
        "concurrency",
        f"Rate limit reached for tenant `{caller.tenant}`: {caller.rates.max_concurrent} requests are in flight, which "
        "is the limit. Send the next when one has ended.",
        CONCURRENCY_RETRY_S,
    )


def _exceeded(caller: Caller, limit: str, per_minute: int, wanted: int, wait_s: float) -> RateLimited:
    return RateLimited(
        limit,
        f"Rate limit reached for tenant `{caller.tenant}` on {limit} per minute: the limit is {per_minute}, this "
        f"request needs {wanted}. Try again in {duration(wait_s)}.",
        wait_s,
    )
