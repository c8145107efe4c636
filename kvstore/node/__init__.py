"""One node of the store: host memory, the tiers below it, and the way to other nodes. `node.py` is the entry."""

from __future__ import annotations

from tandem.kvstore.node.arena import HostArena
from tandem.kvstore.node.fetch import NodeFetch
from tandem.kvstore.node.lookups import StoredObject
from tandem.kvstore.node.node import KvNode
from tandem.kvstore.node.settings import NodeSettings
from tandem.kvstore.node.stats import NodeStats, ScrubReport, TierStats
from tandem.kvstore.node.tickets import Ticket

__all__ = [
    "HostArena",
    "KvNode",
    "NodeFetch",
    "NodeSettings",
    "NodeStats",
    "ScrubReport",
    "StoredObject",
    "Ticket",
    "TierStats",
]
