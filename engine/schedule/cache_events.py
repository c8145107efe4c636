"""What routers are told of a worker's prefix cache, so that they can send a prompt to where its blocks are.

The engine thread writes each change to the `CacheLog`; the event loop reads it with one `CacheFollower` per session. A
follower that falls behind what the log remembers begins again with all that is there, so nothing here grows with a
router that does not read.
"""

from __future__ import annotations

import threading
from collections import deque
from itertools import islice

from tandem.kvstore.identity import BlockHash
from tandem.proto import worker_pb2

LOG_ENTRIES = 65_536
"""Changes that are remembered for followers. A worker that prefills 100k tokens/s makes 12k of them per second."""
MESSAGE_ENTRIES = 16_384
"""Hashes in one message: half a MiB."""


class CacheLog:
    """The hashes in the prefix cache, and the latest changes in order. Safe from any thread."""

    def __init__(self, entries: int = LOG_ENTRIES) -> None:
        self._lock = threading.Lock()
        self._present: set[BlockHash] = set()
        self._changes: deque[tuple[BlockHash, bool]] = deque(maxlen=entries)
        self._count = 0

    @property
    def count(self) -> int:
        """Changes so far."""
        return self._count

    def stored(self, block_hash: BlockHash) -> None:
        """Notes that a block answers prefix look-ups from now on."""
        with self._lock:
            self._present.add(block_hash)
            self._changes.append((block_hash, True))
            self._count += 1

    def removed(self, block_hash: BlockHash) -> None:
        """Notes that a block answers prefix look-ups no more."""
        with self._lock:
            self._present.discard(block_hash)
            self._changes.append((block_hash, False))
            self._count += 1

    def snapshot(self) -> tuple[int, list[BlockHash]]:
        """The number of changes so far, and what is there after them."""
        with self._lock:
            return self._count, list(self._present)

    def since(self, seen: int, most: int) -> list[tuple[BlockHash, bool]] | None:
        """The changes that followed the first `seen`, `most` at the most: (hash, whether it is there now). None: some
        of them are forgotten."""
        with self._lock:
            first = len(self._changes) - (self._count - seen)
            return None if first < 0 else list(islice(self._changes, first, first + most))


class CacheFollower:
    """One router's view of a log: what it has been told so far."""

    def __init__(self, log: CacheLog, message_entries: int = MESSAGE_ENTRIES) -> None:
        self._log = log
        self._most = message_entries
        self._seen: int | None = None
        """Changes that it knows of; None: nothing was sent yet."""
        self._unsent: list[BlockHash] = []
        """What is left of a snapshot."""

    @property
    def behind(self) -> bool:
        return self._seen != self._log.count or bool(self._unsent)

    def take(self) -> worker_pb2.CacheEvents:
        """The next message; call it while `behind`."""
        reset = False
        if not self._unsent:
            changes = None if self._seen is None else self._log.since(self._seen, self._most)
            if self._seen is not None and changes is not None:
                self._seen += len(changes)
                return _net(changes)
            self._seen, self._unsent = self._log.snapshot()
            reset = True
        part, self._unsent = self._unsent[-self._most :], self._unsent[: -self._most]
        return worker_pb2.CacheEvents(reset=reset, stored=b"".join(part))


def _net(changes: list[tuple[BlockHash, bool]]) -> worker_pb2.CacheEvents:
    """What `changes` come to: the last of each hash counts."""
    last = dict(changes)
    return worker_pb2.CacheEvents(
        stored=b"".join(block_hash for block_hash, there in last.items() if there),
        removed=b"".join(block_hash for block_hash, there in last.items() if not there),
    )
