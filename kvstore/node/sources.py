"""Where loading reads from: the tiers below host memory, and other nodes."""

from __future__ import annotations

import time
from collections.abc import Sequence

from tandem.kvstore.interfaces import Located, ObjectKey, PeerReader, TierName
from tandem.kvstore.node import content
from tandem.kvstore.node.books import AVOID_S, Books
from tandem.kvstore.node.finding import peer_of
from tandem.kvstore.node.link_codecs import LinkCodecs
from tandem.kvstore.node.loader import Range


class Sources:
    """`loader.ByteSource`. Owns what is known of the links; never reads with the books' lock held."""

    def __init__(self, books: Books, peers: PeerReader | None, link_codecs: LinkCodecs) -> None:
        self._books = books
        self._peers = peers
        self._link_codecs = link_codecs

    def can_read(self, place: Located) -> bool:
        """Whether an object at `place`, which is not on this node's disk, can be had at all."""
        return (place.tier is TierName.PEER and self._peers is not None) or (
            place.tier is TierName.REMOTE and TierName.REMOTE in self._books.lower
        )

    def read_ranges(self, source: Located, ranges: Sequence[Range]) -> list[bool]:
        """Fills the ranges from the tier or the node of `source`; for each, whether it was filled."""
        lower = self._books.lower.get(source.tier)
        if lower is not None:
            return lower.read_many(ranges)
        if self._peers is None:
            return [False] * len(ranges)
        started = time.perf_counter()
        done = self._peers.read_many(peer_of(source.link), ranges)
        if all(done):
            num_bytes = sum(len(out) for _, _, out in ranges)
            self._link_codecs.links.observe(source.link, num_bytes, len(ranges), time.perf_counter() - started)
        if not any(done):
            with self._books.lock:
                self._books.avoided.add(source.link, b"", self._books.clock() + AVOID_S)
        return done

    def link_codec(self, sources: Sequence[Located], overlap_s: float) -> str:
        """The codec in which to ask for the objects of one link; raw: as they lie there."""
        return self._link_codecs.choose(sources, overlap_s)

    def read_encoded(self, source: Located, key: ObjectKey, codec: str) -> memoryview | None:
        """The whole object, asked for in `codec` and decoded; None if it cannot be had so."""
        if self._peers is None:
            return None
        started = time.perf_counter()
        answer = self._peers.read_encoded(peer_of(source.link), key, codec)
        if answer is None:
            return None
        seconds = time.perf_counter() - started - answer.encode_s
        self._link_codecs.links.observe(source.link, len(answer.content), 1, seconds)
        return content.decoded(memoryview(answer.content))
