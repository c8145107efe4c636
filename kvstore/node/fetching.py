"""Objects on their way into host memory, layer by layer.

A `Load` is one object; every fetch that wants it shares it. The loads of one fetch from one link form a `Batch`, which
a loader thread brings in layer-major: the headers of all, layer 0 of all, layer 1 of all, ... so that the consumer
computes on the first layer while the others arrive. An object is filled front to back, so "how far" is one number.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

import numpy as np

from tandem.kvstore.cost import RAW
from tandem.kvstore.interfaces import Located, ObjectInfo, ObjectKey, TierName
from tandem.kvstore.node import content
from tandem.kvstore.node.arena import aligned
from tandem.kvstore.node.host import HostObject
from tandem.kvstore.node.index import Resident

logger = logging.getLogger(__name__)

_READ_BYTES = 1 << 20
"""A round reads as many further layers as make this many bytes: small objects are not worth a round trip a layer."""
_SLICES = {TierName.DISK: 4, TierName.REMOTE: 4, TierName.PEER: 1}
"""Threads that one batch may use: a disk takes parallel reads, a remote tier is slow to answer, the reads of a peer
are pipelined on one connection."""
_MAX_SIZES = 64
"""Sizes of objects whose layout is remembered."""

Range = tuple[ObjectKey, int, memoryview]


class Load:
    """`filled` and `ends` are set by its loader thread, the rest under the node's lock."""

    def __init__(self, item: HostObject, source: Located, resident: Resident | None) -> None:
        self.item = item
        self.source = source
        self.resident = resident
        """On this node's disk; the load has a lease of it."""
        self.filled = 0
        """Leading bytes that are there."""
        self.ends: tuple[int, ...] = ()
        """Of the layers; empty until the header is there."""
        self.complete = False
        self.failed = False
        """It has ended without the whole object: a fault, or nobody wanted it any more."""
        self.watchers: list[NodeFetch] = []

    @property
    def ended(self) -> bool:
        return self.complete or self.failed

    def layers(self) -> int:
        """Leading layers that are there; -1 before the header."""
        return bisect_right(self.ends, self.filled) if self.ends else -1


class FetchOffice(Protocol):
    """The node, as fetches and loaders see it."""

    def view_of(self, item: HostObject) -> memoryview: ...

    def end_fetch(self, fetch: NodeFetch) -> None: ...

    def read_ranges(self, source: Located, ranges: Sequence[Range]) -> list[bool]: ...

    def link_codec(self, sources: Sequence[Located], overlap_s: float) -> str:
        """In which codec to ask for the objects of one link; raw: as they lie there."""

    def read_encoded(self, source: Located, key: ObjectKey, codec: str) -> memoryview | None:
        """The whole object, asked for in `codec` and decoded."""

    def still_wanted(self, loads: Sequence[Load]) -> list[Load]:
        """Those that a fetch waits for; the others are dropped."""

    def finish_load(self, load: Load, info: ObjectInfo) -> None: ...

    def fail_load(self, load: Load, *, is_damaged: bool) -> None: ...

    def loaded(self, link: str, num_bytes: int, num_objects: int, seconds: float) -> None: ...


class NodeFetch:
    """`interfaces.Fetch`. Leases lapse when nobody looks at it for `lease_s`."""

    def __init__(
        self,
        office: FetchOffice,
        sources: Sequence[Located],
        items: Sequence[HostObject],
        loads: Sequence[Load | None],
        lease_s: float | None,
        clock: Callable[[], float],
    ) -> None:
        """`loads` has None for what is in host memory already."""
        self._office = office
        self._sources = tuple(sources)
        self.items = tuple(items)
        self._loads = tuple(loads)
        self._clock = clock
        self._progress = threading.Condition()
        self._ended = False
        self.lease_s = lease_s
        self.touched_at = clock()

    @property
    def sources(self) -> Sequence[Located]:
        return self._sources

    def wait(self, num_layers: int, timeout_s: float) -> bool:
        """All layers of objects that have fewer than `num_layers`."""
        deadline = time.monotonic() + timeout_s
        with self._progress:
            while True:
                if self._ended or self.failed:
                    return False
                self.touched_at = self._clock()
                if all(load is None or load.complete or load.layers() >= num_layers for load in self._loads):
                    return True
                left = deadline - time.monotonic()
                if left <= 0:
                    return False
                self._progress.wait(left)

    def intact(self) -> int:
        if self._ended:
            return 0
        self.touched_at = self._clock()
        for index, load in enumerate(self._loads):
            if load is not None and not load.complete:
                return index
        return len(self._loads)

    @property
    def ended(self) -> bool:
        """Closed, or its lease has lapsed."""
        return self._ended

    @property
    def failed(self) -> bool:
        """One of the objects cannot be had any more."""
        return any(load is not None and load.failed for load in self._loads)

    def buffer(self, index: int) -> memoryview:
        """Raises ValueError after `close`, or when the lease has lapsed."""
        if self._ended:
            raise ValueError("the fetch is closed, or its lease has lapsed: its memory may hold other objects")
        self.touched_at = self._clock()
        return self._office.view_of(self.items[index]).toreadonly()

    def offset(self, index: int) -> int:
        """Of object `index` in the arena, for a reader in another process."""
        return self.items[index].offset

    def close(self) -> None:
        self._office.end_fetch(self)

    def end(self) -> None:
        """By the node: there is nothing to wait for any more."""
        with self._progress:
            self._ended = True
            self._progress.notify_all()

    def progressed(self) -> None:
        with self._progress:
            self._progress.notify_all()

    def __enter__(self) -> NodeFetch:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Batch:
    """The loads of one fetch from one link; measured from the first read to the last."""

    def __init__(self, link: str, num_slices: int, overlap_s: float) -> None:
        self.link = link
        self.overlap_s = overlap_s
        self._lock = threading.Lock()
        self._left = num_slices
        self._started_at: float | None = None
        self._bytes = 0
        self._objects = 0

    def start(self) -> None:
        with self._lock:
            if self._started_at is None:
                self._started_at = time.perf_counter()

    def finish(self, num_bytes: int, num_objects: int) -> tuple[int, int, float] | None:
        """After a slice: bytes, objects and seconds of the whole batch if it was the last one."""
        with self._lock:
            self._bytes += num_bytes
            self._objects += num_objects
            self._left -= 1
            if self._left or self._started_at is None:
                return None
            return self._bytes, self._objects, time.perf_counter() - self._started_at


class Loader:
    """A few threads. What waits for them is bounded by host memory: each load has its place there."""

    def __init__(self, office: FetchOffice, num_threads: int) -> None:
        self._office = office
        self._jobs: queue.SimpleQueue[tuple[Batch, list[Load]] | None] = queue.SimpleQueue()
        self._closed = False
        self._layer_0_ends: dict[int, int] = {}
        """By size of the object."""
        self._threads = [
            threading.Thread(target=self._run, name=f"kv-load-{index}", daemon=True) for index in range(num_threads)
        ]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def submit(self, loads: Sequence[Load], overlap_s: float) -> None:
        by_link: dict[str, list[Load]] = {}
        for load in loads:
            by_link.setdefault(load.source.link, []).append(load)
        for link, group in by_link.items():
            num_slices = min(_SLICES.get(group[0].source.tier, 1), len(group))
            batch = Batch(link, num_slices, overlap_s)
            for index in range(num_slices):
                self._jobs.put((batch, group[index::num_slices]))

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
            for load in job[1] if job is not None else ():
                self._office.fail_load(load, is_damaged=False)

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            batch, loads = job
            batch.start()
            try:
                self._bring(loads, batch.overlap_s)
            except Exception:
                logger.exception("loading from %s", batch.link)
                for load in loads:
                    self._office.fail_load(load, is_damaged=False)
            done = [load for load in loads if load.complete]
            total = batch.finish(sum(load.item.info.size for load in done), len(done))
            if total is not None and total[1]:
                self._office.loaded(batch.link, *total)

    def _bring(self, loads: list[Load], overlap_s: float) -> None:
        codec = self._office.link_codec([load.source for load in loads], overlap_s)
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
            whole = self._office.read_encoded(load.source, load.item.key, codec)
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
            self._office.read_ranges(
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


def tell_watchers(loads: Iterable[Load]) -> None:
    for fetch in {fetch for load in loads for fetch in tuple(load.watchers)}:
        fetch.progressed()
