"""Fetches: leases of what is here, and loadings of what is not."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from tandem.kvstore.interfaces import Located, ObjectInfo, ObjectKey, Refusal, TierName
from tandem.kvstore.node.books import AVOID_DAMAGED_S, AVOID_S, Books
from tandem.kvstore.node.fetch import Loading, NodeFetch, tell_watchers
from tandem.kvstore.node.host import HostObject, Phase
from tandem.kvstore.node.loader import Loader
from tandem.kvstore.node.sources import Sources

_UNKNOWN_OWNER = ""
"""Charged for an object of another node until its header is here."""


class Fetches:
    """`fetch.FetchOffice` and `loader.LoaderOffice`. Owns open fetches and running loadings under the books' lock, and
    the loader's threads."""

    def __init__(self, books: Books, sources: Sources, num_threads: int) -> None:
        self._books = books
        self._sources = sources
        self._loader = Loader(self, sources, num_threads)
        self._open: set[NodeFetch] = set()
        self._loadings: dict[HostObject, Loading] = {}

    def start(self) -> None:
        self._loader.start()

    def stop_loading(self) -> None:
        """Running reads end first; loadings that wait for a thread fail."""
        self._loader.close()

    def close(self) -> None:
        """Ends every fetch that is open."""
        for fetch in list(self._open):
            self.end_fetch(fetch)

    def fetch(self, located: Sequence[Located], overlap_s: float, lease_s: float | None) -> NodeFetch:
        """Starts to bring objects into host memory. `lease_s` None: leased until `close`."""
        books = self._books
        fresh: list[Loading] = []
        with books.lock:
            sources, items, loadings = self._attach([] if books.closed else located, fresh)
            fetch = NodeFetch(self, sources, items, loadings, lease_s, books.clock)
            for loading in loadings:
                if loading is not None:
                    loading.watchers.append(fetch)
            self._open.add(fetch)
        self._loader.submit(fresh, overlap_s)
        books.announcer.publish()
        return fetch

    def end_fetch(self, fetch: NodeFetch) -> None:
        """Ends its leases, for `NodeFetch.close`; what nobody else waits for is not loaded further."""
        with self._books.lock:
            if fetch not in self._open:
                return
            self._open.remove(fetch)
            for item in fetch.items:
                self._books.host.release(item)
                loading = self._loadings.get(item)
                if loading is not None and fetch in loading.watchers:
                    loading.watchers.remove(fetch)
        fetch.end()

    def reap(self, now: float) -> None:
        """Ends the fetches that nobody has looked at for their lease. The memory rests for as long again, because the
        reader may be in the middle of a copy."""
        with self._books.lock:
            lapsed = [
                (fetch, fetch.lease_s, now - fetch.touched_at)
                for fetch in self._open
                if fetch.lease_s is not None and now - fetch.touched_at > fetch.lease_s
            ]
        for fetch, lease_s, idle_s in lapsed:
            if not fetch.ended:
                fetch.end()
                with self._books.lock:
                    self._books.counters.reaped += 1
            if idle_s > 2 * lease_s:
                self.end_fetch(fetch)

    def view_of(self, item: HostObject) -> memoryview:
        """Its memory, writable. The caller has a lease."""
        return self._books.host.view(item)

    # What loader threads call

    def still_wanted(self, loadings: Sequence[Loading]) -> list[Loading]:
        """Those that a fetch waits for; the others are dropped."""
        with self._books.lock:
            for loading in loadings:
                if not loading.watchers and not loading.ended:
                    self._give_up(loading)
            return [loading for loading in loadings if not loading.ended]

    def finish_loading(self, loading: Loading, info: ObjectInfo) -> None:
        """All of it is in host memory: it can be found from now on. `info` is what its header says."""
        books = self._books
        with books.lock:
            if loading.ended:
                return
            item = loading.item
            known = loading.resident.info if loading.resident is not None else info
            self._end_loading(loading)
            lower = books.lower.get(loading.source.tier)
            if lower is not None:
                books.count_hit(lower.shelf.counters, item)
            else:
                books.counters.peer_hits += 1
                books.counters.peer_hit_bytes += item.info.size
            if lower is not None and (resident := lower.shelf.get(item.key)) is not None:
                lower.shelf.hit(resident)
            if item.phase is Phase.LOADING and books.host.complete(item, known):
                books.announcer.note(item.key, TierName.HOST, item.info.size)
            loading.complete = True
            books.host.release(item)
        tell_watchers([loading])
        books.announcer.publish()

    def fail_loading(self, loading: Loading, *, is_damaged: bool) -> None:
        """It cannot be had from there: nobody is sent there again soon. `is_damaged`: its content is wrong."""
        books = self._books
        with books.lock:
            if loading.ended:
                return
            key, source = loading.item.key, loading.source
            self._give_up(loading)
            books.counters.failed_loads += 1
            if source.tier is TierName.PEER:
                books.avoided.add(source.link, key, books.clock() + (AVOID_DAMAGED_S if is_damaged else AVOID_S))
        tell_watchers([loading])
        lower = books.lower.get(source.tier)
        if is_damaged:
            books.quarantine(key, f"no object of the store ({source.link})")
        elif lower is not None and lower.is_shared:
            with books.lock:
                lower.forget(key)
        elif lower is not None and not books.closed:
            lower.drop(key)  # it cannot be read: keeping it would fail the next fetch, too
        books.announcer.publish()

    # Under the lock

    def held(self) -> Iterator[HostObject]:
        """What fetches and loadings have leases of, as often as they have."""
        yield from (item for fetch in self._open for item in fetch.items)
        yield from self._loadings

    def loading(self) -> set[HostObject]:
        return set(self._loadings)

    @property
    def num_open(self) -> int:
        return len(self._open)

    def _attach(
        self, located: Sequence[Located], fresh: list[Loading]
    ) -> tuple[list[Located], list[HostObject], list[Loading | None]]:
        """Leases the leading run of what is here or can be brought here. What is here comes first, so that making
        room for the rest does not evict it."""
        books = self._books
        here = [self._lease_here(place.key) for place in located]
        sources: list[Located] = []
        items: list[HostObject] = []
        loadings: list[Loading | None] = []
        for place, found in zip(located, here, strict=True):
            item = found or self._lease_here(place.key)  # twice in one fetch
            loading = None
            if item is None:
                loading = self._begin_loading(place)
                if loading is None:
                    break
                item = loading.item
                books.host.lease(item)  # beside the loader's own
                fresh.append(loading)
            elif item.phase is Phase.LOADING:
                loading = self._loadings[item]
            else:
                books.host.shelf.hit(item)
                books.count_hit(books.host.shelf.counters, item)
            books.hot.note(place.key)
            sources.append(item.place)
            items.append(item)
            loadings.append(loading)
        for found in here[len(items) :]:
            if found is not None:
                books.host.release(found)
        return sources, items, loadings

    def _lease_here(self, key: ObjectKey) -> HostObject | None:
        item = self._books.host.get(key)
        if item is None:
            item = self._books.host.pending(key)
            if item is None or item.phase is Phase.WRITING:
                return None
        item.leases += 1
        return item

    def _begin_loading(self, place: Located) -> Loading | None:
        """A place in host memory for an object, and where to get it from; the loader holds one lease of it."""
        books = self._books
        source, info = place, ObjectInfo(size=place.size, num_tokens=0, owner=_UNKNOWN_OWNER)
        disk = books.lower.get(TierName.DISK)
        resident = disk.peek(place.key) if disk is not None else None
        if resident is not None:
            info = resident.info
            source = Located(place.key, TierName.DISK, TierName.DISK.value, info.size)
        elif not self._sources.can_read(place):
            return None
        if source.size <= 0 or books.host.pending(place.key) is not None:
            return None
        item = books.host.reserve(place.key, info, Phase.LOADING)
        if isinstance(item, Refusal):
            return None
        item.origin, item.place = source.link, source
        if resident is not None:
            resident.leases += 1
        loading = self._loadings[item] = Loading(item, source, resident)
        return loading

    def _give_up(self, loading: Loading) -> None:
        self._end_loading(loading)
        loading.failed = True
        self._books.host.detach(loading.item)
        self._books.host.release(loading.item)

    def _end_loading(self, loading: Loading) -> None:
        del self._loadings[loading.item]
        if loading.resident is not None:
            loading.resident.leases -= 1
