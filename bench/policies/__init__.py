"""Eviction policies that no figure recommends, beside those of the product: for comparison (`docs/eviction.md`)."""

from __future__ import annotations

from collections.abc import Callable

from bench.policies.arc import Arc
from bench.policies.cost_aware import CostAware
from bench.policies.marking import Marking
from bench.policies.s3fifo import S3Fifo
from tandem.kvstore import eviction
from tandem.kvstore.interfaces import EvictionPolicy

POLICIES: dict[str, Callable[[int], EvictionPolicy]] = {
    **eviction.POLICIES,
    "s3fifo": S3Fifo,
    "arc": Arc,
    "cost": CostAware,
    "marking": Marking,
}
"""Makes an empty policy for a tier of so many bytes."""
