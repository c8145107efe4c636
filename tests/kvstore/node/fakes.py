"""Tiers, peers and a directory in dicts, with faults on demand; objects that are real bundles."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from tandem.kvstore.bundle import BundleWriter, ChunkSpec, bundle_size
from tandem.kvstore.interfaces import (
    DirectoryEvent,
    Location,
    NodeInfo,
    ObjectInfo,
    ObjectKey,
    TierName,
)
from tandem.kvstore.node import KvNode, NodeSettings, Ticket

LAYERS = 4


def key_of(number: int) -> ObjectKey:
    return ObjectKey(number.to_bytes(32, "little"))


def spec_of(number: int, *, tokens: int = 16, owner: str = "default") -> ChunkSpec:
    return ChunkSpec(
        key=key_of(number),
        namespace=b"n" * 32,
        tokens=list(range(tokens)),
        start_position=0,
        num_layers=LAYERS,
        num_kv_heads=2,
        head_dim=32,
        dtype="bfloat16",
        owner=owner,
        model="small",
    )


def bundle_of(spec: ChunkSpec) -> bytes:
    """Content that depends on the key alone."""
    out = bytearray(bundle_size(spec))
    writer = BundleWriter(spec, memoryview(out))
    rng = random.Random(spec.key)
    for layer in range(spec.num_layers):
        rows = writer.layer(layer)
        rows[:] = rng.randbytes(len(rows))
    writer.finish()
    return bytes(out)


def info_of(spec: ChunkSpec) -> ObjectInfo:
    return ObjectInfo(size=bundle_size(spec), num_tokens=len(spec.tokens), owner=spec.owner, model=spec.model)


SIZE = bundle_size(spec_of(0))
PLACE = -(-SIZE // 4096) * 4096
"""Of one such object in the arena."""


def put(node: KvNode, spec: ChunkSpec) -> bool:
    return put_content(node, ObjectKey(spec.key), info_of(spec), memoryview(bundle_of(spec)))


def put_content(node: KvNode, key: ObjectKey, info: ObjectInfo, content: memoryview) -> bool:
    ticket = node.begin_put(key, info)
    if not isinstance(ticket, Ticket):
        return False
    ticket.buffer[:] = content
    return ticket.commit()


def eventually(condition: Callable[[], bool], timeout_s: float = 60.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.001)


def make_settings(num_objects: float = 64, node_id: str = "a", **others: object) -> NodeSettings:
    fields: dict[str, object] = {
        "epoch": 1,
        "host_id": "host",
        "host_bytes": int(num_objects * PLACE),
        "eviction": "lru",
        **others,
    }
    return NodeSettings(node_id=node_id, **fields)  # type: ignore[arg-type]


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@dataclass
class DictTier:
    """`interfaces.Tier`. `fault` is asked before every operation: True makes it fail; it may block or raise."""

    name: TierName = TierName.DISK
    capacity_bytes: int = 1 << 40
    fault: Callable[[str, ObjectKey], bool] = lambda operation, key: False
    content: dict[ObjectKey, tuple[ObjectInfo, bytes]] = field(default_factory=dict)
    log: list[tuple[str, ObjectKey, int, int]] = field(default_factory=list)
    """(operation, key, offset, length)"""
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def used_bytes(self) -> int:
        return sum(info.size for info, _ in list(self.content.values()))

    def put(self, key: ObjectKey, info: ObjectInfo, content: memoryview) -> bool:
        with self.lock:
            self.log.append(("put", key, 0, len(content)))
        if self.fault("put", key) or self.used_bytes + info.size > self.capacity_bytes:
            return False
        assert len(content) == info.size
        self.content[key] = (info, bytes(content))
        return True

    def info(self, key: ObjectKey) -> ObjectInfo | None:
        found = None if self.fault("info", key) else self.content.get(key)
        return None if found is None else found[0]

    def read(self, key: ObjectKey, offset: int, out: memoryview) -> bool:
        with self.lock:
            self.log.append(("read", key, offset, len(out)))
        found = None if self.fault("read", key) else self.content.get(key)
        if found is None or offset + len(out) > len(found[1]):
            return False
        out[:] = found[1][offset : offset + len(out)]
        return True

    def delete(self, key: ObjectKey) -> bool:
        return not self.fault("delete", key) and self.content.pop(key, None) is not None

    def objects(self) -> Iterator[tuple[ObjectKey, ObjectInfo]]:
        return iter([(key, info) for key, (info, _) in self.content.items()])

    def check_integrity(self) -> None: ...

    def close(self) -> None: ...


class DictDirectory:
    """`interfaces.Directory`; follows the events of the nodes, at once."""

    def __init__(self) -> None:
        self.held: dict[str, dict[tuple[ObjectKey, TierName], int]] = {}
        self.infos: dict[str, NodeInfo] = {}
        self.snapshots: dict[str, Callable[[], Sequence[DirectoryEvent]]] = {}

    def register(self, node: NodeInfo, snapshot: Callable[[], Sequence[DirectoryEvent]]) -> None:
        self.infos[node.node_id] = node
        self.snapshots[node.node_id] = snapshot
        self.held[node.node_id] = {}
        self.publish(node.node_id, snapshot())

    def publish(self, node_id: str, events: Sequence[DirectoryEvent]) -> None:
        held = self.held[node_id]
        for event in events:
            if event.size:
                held[event.key, event.tier] = event.size
            else:
                held.pop((event.key, event.tier), None)

    def lookup(self, keys: Sequence[ObjectKey]) -> list[tuple[Location, ...]]:
        return [
            tuple(
                Location(node_id, self.infos[node_id].epoch, tier, size)
                for node_id, held in self.held.items()
                for (each, tier), size in list(held.items())
                if each == key
            )
            for key in keys
        ]

    def nodes(self) -> dict[str, NodeInfo]:
        return dict(self.infos)

    def close(self) -> None: ...


class DirectPeers:
    """`interfaces.PeerReader` over nodes of this process."""

    def __init__(self) -> None:
        self.nodes: dict[str, KvNode] = {}
        self.calls: list[tuple[str, int]] = []
        """(node, number of ranges)"""

    def read_many(self, node_id: str, ranges: Sequence[tuple[ObjectKey, int, memoryview]]) -> list[bool]:
        self.calls.append((node_id, len(ranges)))
        node = self.nodes.get(node_id)
        return [node is not None and node.read_range(key, offset, out) for key, offset, out in ranges]

    def push(self, node_id: str, key: ObjectKey, info: ObjectInfo, content: memoryview) -> bool:
        node = self.nodes.get(node_id)
        return node is not None and put_content(node, key, info, content)
