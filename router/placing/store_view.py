"""What each worker could fetch from the KV store instead of computing it: the directory, followed in the background.

A hint, as the directory itself: a worker that does not find what was promised here computes it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Protocol

from tandem.kvstore.directory import watch_directory
from tandem.kvstore.interfaces import Location, ObjectKey, TierName


class Lookup(Protocol):
    """The part of `DirectoryWatcher` that is used here."""

    def lookup(self, keys: Sequence[ObjectKey]) -> list[tuple[Location, ...]]: ...

    def __len__(self) -> int: ...

    def close(self) -> None: ...


class StoreView:
    """Safe from any thread. Keys of other models and tenants may be on record, too: they match nothing."""

    def __init__(self, watcher: Lookup) -> None:
        self._watcher = watcher

    @classmethod
    def open(cls, url: str, secret: bytes = b"") -> StoreView:
        """Follows the directory at `url` until `close`; it need not be up yet. Raises ConfigError."""
        return cls(watch_directory(url, secret))

    def close(self) -> None:
        self._watcher.close()

    def __len__(self) -> int:
        return len(self._watcher)

    def reach(
        self, keys: Sequence[ObjectKey], chunk_tokens: int, nodes: Collection[str]
    ) -> Mapping[str, Sequence[tuple[str, int]]]:
        """Leading chunks of the chain `keys` that each of `nodes` can fetch, by node, as runs of (tier, end of the run
        in tokens). An object on any other node counts as a peer's."""
        found: list[tuple[Location, ...]] = []
        for locations in self._watcher.lookup(keys):
            if not locations:
                break
            found.append(locations)
        return {node: _runs(found, chunk_tokens, node) for node in nodes} if found else {}


_RANK = {TierName.HOST: 0, TierName.DISK: 1, TierName.PEER: 2, TierName.REMOTE: 3}


def _runs(found: Sequence[tuple[Location, ...]], chunk_tokens: int, node: str) -> list[tuple[str, int]]:
    runs: list[tuple[str, int]] = []
    for index, locations in enumerate(found):
        tier = min((_seen_from(node, location) for location in locations), key=lambda name: _RANK.get(name, 9))
        end = (index + 1) * chunk_tokens
        if runs and runs[-1][0] == tier:
            runs[-1] = tier, end
        else:
            runs.append((tier, end))
    return runs


def _seen_from(node: str, location: Location) -> TierName:
    """Its own disk is a node's own; anybody's remote tier is everybody's."""
    if location.node_id == node or location.tier is TierName.REMOTE:
        return location.tier
    return TierName.PEER
