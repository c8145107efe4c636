"""Objects on their way into host memory, layer by layer.

What one fetch wants from one link is brought in layer-major by a loader thread: the headers of all, layer 0 of all,
layer 1 of all, ... so that the consumer computes on the first layer while the others arrive.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from tandem.kvstore.cost import RAW
from tandem.kvstore.interfaces import Located, ObjectInfo, ObjectKey, TierName
from tandem.kvstore.node import content
from tandem.kvstore.node.arena import aligned
from tandem.kvstore.node.fetch import Loading, tell_watchers
from tandem.kvstore.node.host import HostObject

logger = logging.getLogger(__name__)

_READ_BYTES = 1 << 20
"""A round reads as many further layers as make this many bytes: small objects are not worth a round trip a layer."""
_SLICES = {TierName.DISK: 4, TierName.REMOTE: 4, TierName.PEER: 1}
"""Threads that one batch may use: a disk takes parallel reads, a remote tier is slow to answer, the reads of a peer
are pipelined on one connection."""
_MAX_SIZES = 64
"""Sizes of objects whose layout is remembered."""

Range = tuple[ObjectKey, int, memoryview]
"""Key, offset in the object, where its bytes go."""


class ByteSource(Protocol):
    """Where bytes come from; asked without any lock."""

    def read_ranges(self, source: Located, ranges: Sequence[Range]) -> list[bool]: ...

    def link_codec(self, sources: Sequence[Located], overlap_s: float) -> str:
        """The codec in which to ask for the objects of one link; raw: as they lie there."""

    def read_encoded(self, source: Located, key: ObjectKey, codec: str) -> memoryview | None:
        """The whole object, asked for in `codec` and decoded."""


class LoaderOffice(Protocol):
    """The node's part that loadings are begun and ended at."""

    def view_of(self, item: HostObject) -> memoryview: ...

    def still_wanted(self, loadings: Sequence[Loading]) -> list[Loading]:
        """Those that a fetch waits for; the others are dropped."""

    def finish_loading(self, loading: Loading, info: ObjectInfo) -> None: ...

    def fail_loading(self, loading: Loading, *, is_damaged: bool) -> None: ...


class Loader:
    """A few threads. What waits for them is bounded by host memory: each loading has its place there."""

    def __init__(self, office: LoaderOffice, sources: ByteSource, num_threads: int) -> None:
        self._office = office
        self._sources = sources
        self._jobs: queue.SimpleQueue[tuple[list[Loading], float] | None] = queue.SimpleQueue()
        self._closed = False
        self._layer_0_ends: dict[int, int] = {}
        """Ends of layer 0 in bytes, by size of the object."""
        self._threads = [
            threading.Thread(target=self._run, name=f"kv-load-{index}", daemon=True) for index in range(num_threads)
        ]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def submit(self, loadings: Sequence[Loading], overlap_s: float) -> None:
        """Hands loadings to the threads, link by link. Never blocks."""
        by_link: dict[str, list[Loading]] = {}
        for loading in loadings:
            by_link.setdefault(loading.source.link, []).append(loading)
        for group in by_link.values():
            num_slices = min(_SLICES.get(group[0].source.tier, 1), len(group))
            for index in range(num_slices):
                self._jobs.put((group[index::num_slices], overlap_s))

    def close(self) -> None:
        """Running reads end first; loadings that wait for a thread fail."""
        self._closed = True
        for _ in self._threads:
            self._jobs.put(None)
        for thread in self._threads:
            if thread.is_alive():
                thread.join()
        while not self._jobs.empty():
            job = self._jobs.get()
            for loading in job[0] if job is not None else ():
                self._office.fail_loading(loading, is_damaged=False)

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            loadings, overlap_s = job
            try:
                self._bring(loadings, overlap_s)
            except Exception:
                logger.exception("loading from %s", loadings[0].source.link)
                for loading in loadings:
                    self._office.fail_loading(loading, is_damaged=False)

    def _bring(self, loadings: list[Loading], overlap_s: float) -> None:
        codec = self._sources.link_codec([loading.source for loading in loadings], overlap_s)
        if codec != RAW:
            loadings = self._bring_encoded(loadings, codec)
        live = self._read(loadings, [self._first_stop(loading.source.size) for loading in loadings])
        live = self._open(live)
        layer = 0
        while live:
            stops = [_stop(loading, layer) for loading in live]
            while sum(stops) - sum(loading.filled for loading in live) < _READ_BYTES and any(
                stop < loading.source.size for stop, loading in zip(stops, live, strict=True)
            ):
                layer += 1
                stops = [_stop(loading, layer) for loading in live]
            live = self._read(live, stops)
            live = [loading for loading in live if not self._finished(loading)]
            layer += 1

    def _bring_encoded(self, loadings: list[Loading], codec: str) -> list[Loading]:
        """One whole object after the other. Returns what cannot be had encoded, from the first such object on: it is
        read as it is."""
        for index, loading in enumerate(loadings):
            if self._closed:
                return loadings[index:]
            if not self._office.still_wanted([loading]):
                continue
            whole = self._sources.read_encoded(loading.source, loading.item.key, codec)
            ends = content.layer_ends(whole, loading.source.size) if whole is not None else None
            if whole is None or not isinstance(ends, tuple):
                return loadings[index:]
            np.copyto(np.frombuffer(self._view(loading, 0, len(whole)), np.uint8), np.frombuffer(whole, np.uint8))
            loading.ends, loading.filled = ends, len(whole)
            tell_watchers([loading])
            self._finished(loading)
        return []

    def _first_stop(self, size: int) -> int:
        """Past layer 0, if an object of the same size told where that ends: chunks of one model are alike. The object's
        own header decides; a wrong guess costs bytes that are needed soon, or one more read."""
        return min(self._layer_0_ends.get(size, content.HEAD_BYTES), size)

    def _learn(self, loading: Loading) -> None:
        if len(self._layer_0_ends) >= _MAX_SIZES:
            self._layer_0_ends.clear()
        self._layer_0_ends[loading.source.size] = aligned(loading.ends[0])

    def _open(self, loadings: list[Loading]) -> list[Loading]:
        """Learns the layers from the headers, reading on where one is longer than usual."""
        opened: list[Loading] = []
        for loading in loadings:
            size = loading.source.size
            ends = content.layer_ends(self._view(loading, 0, loading.filled), size)
            if isinstance(ends, int) and loading.filled < ends <= size and self._read([loading], [ends]):
                ends = content.layer_ends(self._view(loading, 0, loading.filled), size)
            if isinstance(ends, tuple) and ends:
                loading.ends = ends
                self._learn(loading)
                opened.append(loading)
            elif not loading.failed:
                self._office.fail_loading(loading, is_damaged=True)
        return opened

    def _read(self, loadings: list[Loading], stops: list[int]) -> list[Loading]:
        """Fills each loading up to its stop; returns those that are still alive and wanted."""
        if self._closed:
            for loading in loadings:
                self._office.fail_loading(loading, is_damaged=False)
            return []
        wanted = set(map(id, self._office.still_wanted(loadings)))
        todo = [(loading, stop) for loading, stop in zip(loadings, stops, strict=True) if id(loading) in wanted]
        ranges = [(loading, stop) for loading, stop in todo if stop > loading.filled]
        done = (
            self._sources.read_ranges(
                ranges[0][0].source,
                [
                    (loading.item.key, loading.filled, self._view(loading, loading.filled, stop))
                    for loading, stop in ranges
                ],
            )
            if ranges
            else []
        )
        for (loading, stop), ok in zip(ranges, done, strict=True):
            if ok:
                loading.filled = stop
            else:
                self._office.fail_loading(loading, is_damaged=False)
        tell_watchers(loading for loading, _ in ranges)
        return [loading for loading, _ in todo if not loading.failed]

    def _finished(self, loading: Loading) -> bool:
        if loading.filled < loading.source.size:
            return False
        whole = self._view(loading, 0, loading.source.size)
        info = content.describe(whole)
        # The consumer checks every layer; this keeps what a peer or a network garbled from being passed on to others.
        if info is None or (loading.source.tier is TierName.PEER and not content.is_sound(whole)):
            self._office.fail_loading(loading, is_damaged=True)
        else:
            self._office.finish_loading(loading, info)
        return True

    def _view(self, loading: Loading, start: int, stop: int) -> memoryview:
        return self._office.view_of(loading.item)[start:stop]


def _stop(loading: Loading, layer: int) -> int:
    """How far to read so that `layer` is there. Whole pages, which direct disk reads can take."""
    if layer >= len(loading.ends) - 1:
        return loading.source.size
    return max(loading.filled, min(aligned(loading.ends[layer]), loading.source.size))
