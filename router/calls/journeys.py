"""How the KV of a prompt came to the worker that decodes: by which way, how much, and how long that took."""

from __future__ import annotations

from dataclasses import dataclass

from tandem.kvstore.interfaces import TierName
from tandem.proto import worker_pb2

AS_STORED = "as_stored"
"""Codec of what comes from the store: each object has its own."""


@dataclass(frozen=True, slots=True)
class Journey:
    """KV that took one way."""

    transport: str
    """`shared_memory`, `unix` or `tcp` from a prefill worker; `store_` and a tier from the store."""
    codec: str
    bytes: int
    """Before any codec."""
    seconds: float
    """For which the first token waited: what compute did not hide. Tiers loaded at once share it by their tokens."""


def journeys(report: worker_pb2.PromptReport, kv_bytes_per_token: int) -> list[Journey]:
    """What a worker's report tells of. Empty where the KV was on the device or computed there."""
    ways = []
    loaded = {tier: n for tier, n in report.cached_by_tier.items() if tier != TierName.DEVICE and n}
    for tier, tokens in loaded.items():
        seconds = report.load_s * tokens / sum(loaded.values())
        ways.append(Journey(f"store_{tier}", AS_STORED, tokens * kv_bytes_per_token, seconds))
    if report.handover_transport and not report.recompute_reason:
        ways.append(Journey(report.handover_transport, report.handover_codec, report.handover_bytes, report.handover_s))
    return ways
