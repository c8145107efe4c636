"""The line in the log that says how busy the platform is, every ten seconds while there is work."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass

from tandem.router.calls.request_log import RequestLog, Value, pairs_of
from tandem.router.service import Service

EVERY_S = 10.0


@dataclass(frozen=True, slots=True)
class Counts:
    """Totals of this router process so far."""

    prompt_tokens: int
    cached_tokens: int
    output_tokens: int


def counts(service: Service) -> Counts:
    metrics = service.metrics
    return Counts(metrics.prompt_tokens_seen, metrics.cached_tokens_seen, metrics.output_tokens_seen)


def throughput(before: Counts, after: Counts, seconds: float, service: Service) -> dict[str, Value] | None:
    """None where nothing was done and nothing is to do."""
    prompt, output = after.prompt_tokens - before.prompt_tokens, after.output_tokens - before.output_tokens
    if not (prompt or output or service.in_flight):
        return None
    states = [client.session.status for client in service.fleet.clients if client.session is not None]
    blocks = sum(state.total_blocks for state in states)
    used = blocks - sum(state.free_blocks for state in states)
    return {
        "prompt_tokens_per_s": round(prompt / seconds, 1),
        "output_tokens_per_s": round(output / seconds, 1),
        "running": sum(state.running for state in states),
        "waiting": sum(state.waiting for state in states) + service.admission.waiting_requests,
        "kv_used_percent": round(100 * used / blocks, 1) if blocks else None,
        "prefix_hit_percent": round(100 * (after.cached_tokens - before.cached_tokens) / prompt, 1) if prompt else None,
    }


async def tell_regularly(service: Service, log: RequestLog) -> None:
    """Writes a line every `EVERY_S` in which there was work, until it is cancelled."""
    before, since = counts(service), time.monotonic()
    while True:
        await asyncio.sleep(EVERY_S)
        after, now = counts(service), time.monotonic()
        values = throughput(before, after, now - since, service)
        if values is not None:
            log.note("throughput", pairs_of(values))
        before, since = after, now
