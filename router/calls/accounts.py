"""One request on its tenant's account: may it, is there room for it under the limits, and what did it use.

`Service.call` opens a charge and closes it, so that every front door is counted alike.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager

from prometheus_client import CollectorRegistry

from tandem.common.errors import TandemError
from tandem.router.calls.choice import ChoiceSpec
from tandem.router.calls.generate import Usage
from tandem.router.tenants.caller import Caller
from tandem.router.tenants.usage import UsageCollector, UsageLog
from tandem.router.turns.limits import (
    BYTES_PER_REQUEST,
    Buckets,
    Limits,
    LocalBuckets,
    Place,
    RateLimited,
    Reservation,
)

REJECTIONS = frozenset({"rate_limit_exceeded", "overloaded"})


class Accounts:
    """Limits and usage of all tenants, as one router counts them. On the event loop."""

    def __init__(self, registry: CollectorRegistry | None = None, buckets: Buckets | None = None) -> None:
        """`buckets`: shared ones where routers share limits."""
        self.limits = Limits(LocalBuckets(time.monotonic) if buckets is None else buckets)
        self.usage = UsageLog(time.time)
        if registry is not None:
            registry.register(UsageCollector(self.usage))

    @asynccontextmanager
    async def entering(self, caller: Caller, size: Callable[[], int], *, generates: bool) -> AsyncIterator[Place]:
        """One request at a front door, from its arrival on. `size`: bytes that it had in the end; `generates`: it goes
        to the workers, unless it is refused. Raises RateLimited."""
        if caller.rates.unlimited:
            yield self.limits.enter(caller, tokens=generates)
            return
        await self.limits.hear_before_entering(caller)
        place = self.limits.enter(caller, tokens=generates)
        read_in_vain = not generates
        try:
            yield place
        except RateLimited:
            place.give_back()
            read_in_vain = size() >= BYTES_PER_REQUEST
            raise
        except TandemError as error:
            read_in_vain = read_in_vain or error.kind.http_status < 500
            raise
        except BaseException:  # the client has gone
            read_in_vain = True
            raise
        finally:
            if read_in_vain:
                place.charge(size())
            place.close()

    async def open(self, model: str, choices: Sequence[ChoiceSpec]) -> Charge:
        """Raises TandemError `permission_denied` or `rate_limit_exceeded`."""
        caller = choices[0].sequence.caller
        caller.check_model(model)
        prompts = {id(choice.sequence.prompt): choice.sequence.prompt for choice in choices}
        prompt_tokens = sum(len(prompt.token_ids) for prompt in prompts.values())
        max_output_tokens = sum(choice.sequence.sampling.max_tokens for choice in choices)
        await self.limits.hear_others(caller, prompt_tokens, max_output_tokens)
        return Charge(caller, self.limits.reserve(caller, prompt_tokens, max_output_tokens), self.usage)

    def refused(self, caller: Caller, error: TandemError) -> None:
        """The front doors tell every error here; only rejections are counted."""
        if error.code in REJECTIONS:
            self.usage.rejected(caller.tenant)


class Charge:
    """Close it whatever happens."""

    __slots__ = ("_caller", "_log", "_raised", "_reservation")

    def __init__(self, caller: Caller, reservation: Reservation, log: UsageLog) -> None:
        self._caller = caller
        self._reservation = reservation
        self._log = log
        self._raised: TandemError | None = None

    def fail(self, error: TandemError) -> None:
        """The request ends with this error, which goes on to the front door."""
        self._raised = error

    def close(self, usage: Usage, error: TandemError | None = None) -> None:
        """`error`: what ended the call, where it was told inside a stream. What failed before any output is free, but
        not for a client that went away: it may just want the prompt computed."""
        error = self._raised or error
        free = error is not None and error.code != "cancelled" and usage.completion_tokens == 0
        if not free:
            self._reservation.settle(usage.prompt_tokens, usage.completion_tokens)
        self._reservation.close()
        if free and self._raised is not None and self._raised.code in REJECTIONS:
            return  # the front door has it counted as a rejection
        self._log.ended(
            self._caller.tenant,
            prompt_tokens=usage.prompt_tokens,
            completion_tokens=usage.completion_tokens,
            cached_by_tier=usage.cached_by_tier,
            failed=free,
        )
