"""What a node has to be told. Users set `kvstore/settings.py`; the process that opens a node fills this from it."""

from __future__ import annotations

from dataclasses import dataclass, field

from tandem.kvstore.eviction import DEFAULT_POLICY, Shares

PUT_LEASE_S = 30.0
"""A put that is neither committed nor aborted by then is reaped: the key is free for others."""
ZOMBIE_GRACE_S = 60.0
"""Time from then until its memory is used again, even if the writer has not been heard of: a writer that sleeps for
longer than both times may then write into another object, which the checksums of that object show (a miss)."""
READ_LEASE_S = 60.0
"""A fetch that nobody looks at for so long lapses; its memory stays for as long again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeSettings:
    """What a node is told when it is opened."""

    node_id: str
    epoch: int
    """Differs for every start of the process, and grows."""
    host_id: str
    """Nodes with equal host_id share memory and unix sockets."""
    host_bytes: int
    """Capacity of the arena."""
    eviction: str = DEFAULT_POLICY
    """Policy of every tier, a name of `kvstore/eviction`."""
    quotas: Shares = field(default_factory=Shares)
    """Shares of each tier that owners may fill."""
    disk_codec: str = "raw"
    """How objects are encoded on their way to the disk tier."""
    remote_codec: str = "raw"
    """How objects are encoded on their way to the remote tier."""
    link_codec: str = "raw"
    """How objects are encoded on their way from other nodes; `auto`: whatever is fastest, link by link."""
    near_allowed: bool = False
    """Whether auto may choose codecs that are not exact."""
    loaders: int = 4
    """Threads that bring objects into host memory."""
