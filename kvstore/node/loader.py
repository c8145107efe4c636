"""Objects on their way into host memory, layer by layer.

The loads of one fetch from one link are brought in layer-major by a loader thread: the headers of all, layer 0 of all,
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
from tandem.kvstore.node.fetch import Load, tell_watchers
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


class LoadOffice(Protocol):
    """The node's part that loads are begun and ended at."""

    def view_of(self, item: HostObject) -> memoryview: ...

    def still_wanted(self, loads: Sequence[Load]) -> list[Load]:
        """Those that a fetch waits for; the others are dropped."""

    def finish_load(self, load: Load, info: ObjectInfo) -> None: ...

    def fail_load(self, load: Load, *, is_damaged: bool) -> None: ...


class Loader:
    """A few threads. What waits for them is bounded by host memory: each load has its place there."""

    def __init__(self, office: LoadOffice, sources: ByteSource, num_threads: int) -> None:
        self._office = office
        self._sources = sources
        self._jobs: queue.SimpleQueue[tuple[list[Load], float] | None] = queue.SimpleQueue()
        self._closed = False
        self._layer_0_ends: dict[int, int] = {}
        """Ends of layer 0 in bytes, by size of the object."""
        self._threads = [
            threading.Thread(target=self._run, name=f"kv-load-{index}", daemon=True) for index in range(num_threads)
        ]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def submit(self, loads: Sequence[Load], overlap_s: float) -> None:
        """Hands loads to the threads, link by link. Never blocks."""
        by_link: dict[str, list[Load]] = {}
        for load in loads:
            by_link.setdefault(load.source.link, []).append(load)
        for group in by_link.values():
            num_slices = min(_SLICES.get(group[0].source.tier, 1), len(group))
            for index in range(num_slices):
                self._jobs.put((group[index::num_slices], overlap_s))

    def close(self) -> None:
        """Running reads end first; loads that wait for a thread fail."""
        self._closed = True
        for _ in self._threads:
            self._jobs.put(None)
        for thread in self._threads:
            if thread.is_alive():
                thread.join()
        while not self._jobs.empty():
            job = self._jobs.get()
            for load in job[0] if job is not None else ():
                self._office.fail_load(load, is_damaged=False)

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            loads, overlap_s = job
            try:
                self._bring(loads, overlap_s)
            except Exception:
                logger.exception("loading from %s", loads[0].source.link)
                for load in loads:
                    self._office.fail_load(load, is_damaged=False)

    def _bring(self, loads: list[Load], overlap_s: float) -> None:
        codec = self._sources.link_codec([load.source for load in loads], overlap_s)
        if codec != RAW:
            loads = self._bring_encoded(loads, codec)
        live = self._read(loads, [self._first_stop(load.source.size) for load in loads])
        live = self._open(live)
        layer = 0
        while live:
            stops = [_stop(load, layer) for load in live]
            while sum(stops) - sum(load.filled for load in live) < _READ_BYTES and any(
                stop < load.source.size for stop, load in zip(stops, live, strict=True)
            ):
                layer += 1
                stops = [_stop(load, layer) for load in live]
            live = self._read(live, stops)
            live = [load for load in live if not self._finished(load)]
            layer += 1

    def _bring_encoded(self, loads: list[Load], codec: str) -> list[Load]:
        """One whole object after the other. Returns what cannot be had encoded, from the first such object on: it is
        read as it is."""
        for index, load in enumerate(loads):
            if self._closed:
                return loads[index:]
            if not self._office.still_wanted([load]):
                continue
            whole = self._sources.read_encoded(load.source, load.item.key, codec)
            ends = content.layer_ends(whole, load.source.size) if whole is not None else None
            if whole is None or not isinstance(ends, tuple):
                return loads[index:]
            np.copyto(np.frombuffer(self._view(load, 0, len(whole)), np.uint8), np.frombuffer(whole, np.uint8))
            load.ends, load.filled = ends, len(whole)
            tell_watchers([load])
            self._finished(load)
        return []

    def _first_stop(self, size: int) -> int:
        """Past layer 0, if an object of the same size told where that ends: chunks of one model are alike. The object's
        own header decides; a wrong guess costs bytes that are needed soon, or one more read."""
        return min(self._layer_0_ends.get(size, content.HEAD_BYTES), size)

    def _learn(self, load: Load) -> None:
        if len(self._layer_0_ends) >= _MAX_SIZES:
            self._layer_0_ends.clear()
        self._layer_0_ends[load.source.size] = aligned(load.ends[0])

    def _open(self, loads: list[Load]) -> list[Load]:
        """Learns the layers from the headers, reading on where one is longer than usual."""
        opened: list[Load] = []
        for load in loads:
            size = load.source.size
            ends = content.layer_ends(self._view(load, 0, load.filled), size)
            if isinstance(ends, int) and load.filled < ends <= size and self._read([load], [ends]):
                ends = content.layer_ends(self._view(load, 0, load.filled), size)
            if isinstance(ends, tuple) and ends:
                load.ends = ends
                self._learn(load)
                opened.append(load)
            elif not load.failed:
                self._office.fail_load(load, is_damaged=True)
        return opened

    def _read(self, loads: list[Load], stops: list[int]) -> list[Load]:
        """Fills each load up to its stop; returns those that are still alive and wanted."""
        if self._closed:
            for load in loads:
                self._office.fail_load(load, is_damaged=False)
            return []
        wanted = set(map(id, self._office.still_wanted(loads)))
        todo = [(load, stop) for load, stop in zip(loads, stops, strict=True) if id(load) in wanted]
        ranges = [(load, stop) for load, stop in todo if stop > load.filled]
        done = (
            self._sources.read_ranges(
                ranges[0][0].source,
                [(load.item.key, load.filled, self._view(load, load.filled, stop)) for load, stop in ranges],
            )
            if ranges
            else []
        )
        for (load, stop), ok in zip(ranges, done, strict=True):
            if ok:
                load.filled = stop
            else:
                self._office.fail_load(load, is_damaged=False)
        tell_watchers(load for load, _ in ranges)
        return [load for load, _ in todo if not load.failed]

    def _finished(self, load: Load) -> bool:
        if load.filled < load.source.size:
            return False
        whole = self._view(load, 0, load.source.size)
        info = content.describe(whole)
        # The consumer checks every layer; this keeps what a peer or a network garbled from being passed on to others.
        if info is None or (load.source.tier is TierName.PEER and not content.is_sound(whole)):
            self._office.fail_load(load, is_damaged=True)
        else:
            self._office.finish_load(load, info)
        return True

    def _view(self, load: Load, start: int, stop: int) -> memoryview:
        return self._office.view_of(load.item)[start:stop]


def _stop(load: Load, layer: int) -> int:
    """How far to read so that `layer` is there. Whole pages, which direct disk reads can take."""
    if layer >= len(load.ends) - 1:
        return load.source.size
    return max(load.filled, min(aligned(load.ends[layer]), load.source.size))
