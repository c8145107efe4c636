"""Which other node an object is had from, and which ones to leave alone for a while."""

from __future__ import annotations

import zlib
from collections import OrderedDict
from collections.abc import Mapping, Sequence

from tandem.kvstore.interfaces import Located, Location, NodeInfo, ObjectKey, TierName

_PEER = "peer:"
_MAX_AVOIDED = 4096


def peer_link(node_id: str) -> str:
    return _PEER + node_id


def peer_of(link: str) -> str:
    """The node of a link `peer:NODE_ID`."""
    return link.removeprefix(_PEER)


class Avoided:
    """Places that have just failed, each until a time; bounded. Not thread-safe: under the node's lock."""

    def __init__(self) -> None:
        self._until: OrderedDict[tuple[str, bytes], float] = OrderedDict()

    def add(self, link: str, key: bytes, until: float) -> None:
        """No key: the whole link."""
        self._until[link, key] = until
        self._until.move_to_end((link, key))
        if len(self._until) > _MAX_AVOIDED:
            self._until.popitem(last=False)

    def holds(self, link: str, key: bytes, now: float) -> bool:
        return any(self._until.get((link, each), now) > now for each in (b"", key))


def choose_peer(
    key: ObjectKey,
    locations: Sequence[Location],
    nodes: Mapping[str, NodeInfo],
    own: NodeInfo,
    avoided: Avoided,
    now: float,
) -> Located | None:
    """A node of this host rather than another host, memory rather than disk, and among equals one that depends on the
    key and the asker, so that copies share the load. Entries of earlier epochs and of dead nodes are void."""
    usable = [
        place
        for place in locations
        if place.node_id != own.node_id
        and place.size > 0
        and (node := nodes.get(place.node_id)) is not None
        and node.epoch == place.epoch
        and not avoided.holds(peer_link(place.node_id), key, now)
    ]
    if not usable:
        return None
    best = min(
        usable,
        key=lambda place: (
            nodes[place.node_id].host_id != own.host_id,
            place.tier is not TierName.HOST,
            zlib.crc32(f"{own.node_id}/{place.node_id}".encode(), int.from_bytes(key[:4], "little")),
        ),
    )
    return Located(key, TierName.PEER, peer_link(best.node_id), best.size)


class HotKeys:
    """How often objects were fetched lately: counts are halved whenever the table is full, and by `decay`. Bounded."""

    def __init__(self, max_keys: int = 8192) -> None:
        self._max_keys = max_keys
        self._hits: dict[ObjectKey, int] = {}

    def note(self, key: ObjectKey) -> None:
        self._hits[key] = self._hits.get(key, 0) + 1
        if len(self._hits) > self._max_keys:
            self.decay()

    def decay(self) -> None:
        self._hits = {key: hits // 2 for key, hits in self._hits.items() if hits > 1}

    def above(self, threshold: int) -> dict[ObjectKey, int]:
        """Most fetched first."""
        found = [(hits, key) for key, hits in self._hits.items() if hits >= threshold]
        return {key: hits for hits, key in sorted(found, reverse=True)}
