"""S3 and its relatives, through obstore (extra `s3`). An object is a header page and the content, under PREFIX/ab/KEY.

The service may be far away or down: every request has a time limit, and a circuit breaker keeps a dead one cheap.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import TYPE_CHECKING, TypeVar

from tandem.common.errors import ConfigError
from tandem.kvstore.interfaces import ObjectInfo, ObjectKey, StoreIntegrityError, TierName
from tandem.kvstore.tiers.books import Books
from tandem.kvstore.tiers.breaker import Breaker
from tandem.kvstore.tiers.faults import FaultLog
from tandem.kvstore.tiers.records import KEY_BYTES, PAGE, Record, decode_page, encode_page, new_record

if TYPE_CHECKING:
    from obstore.store import ObjectStore

CONNECT_TIMEOUT = timedelta(seconds=1)
REQUEST_TIMEOUT = timedelta(seconds=10)
"""Time limit of one request as a whole: a part of at most 5 MiB going up, or a layer coming down."""
RETRY_TIMEOUT = timedelta(seconds=5)
LIST_PAGE = 256
HEADER_READERS = 16
HEADERS_KEPT = 4096

T = TypeVar("T")


def open_store(url: str) -> ObjectStore:
    """A client for `s3://bucket/prefix`; region, endpoint and credentials come from the AWS_* environment variables.
    Raises ConfigError."""
    try:
        from obstore.exceptions import BaseError
        from obstore.store import S3Store
    except ImportError as error:
        raise ConfigError(f'kv_remote: {url} needs obstore; pip install "tandem-llm[s3]"') from error
    try:
        return S3Store.from_url(
            url,
            client_options={
                "allow_http": True,
                "connect_timeout": CONNECT_TIMEOUT,
                "timeout": REQUEST_TIMEOUT,
            },
            retry_config={"max_retries": 1, "retry_timeout": RETRY_TIMEOUT},
        )
    except (BaseError, ValueError) as error:
        raise ConfigError(
            f"kv_remote: {url} cannot be used: {error}; it should look like s3://bucket/prefix"
        ) from error


class ObjectStoreTier:
    """Implements `interfaces.Tier` on any obstore store. `capacity_bytes` is for the whole prefix."""

    name = TierName.REMOTE

    def __init__(self, store: ObjectStore, capacity_bytes: int, breaker: Breaker | None = None) -> None:
        import obstore

        self._api = obstore
        self._store = store
        self.capacity_bytes = capacity_bytes
        self.faults = FaultLog(f"object store tier {store}")
        self._breaker = breaker or Breaker()
        self._closed = False
        self._headers: dict[ObjectKey, Record] = {}
        """Headers of objects met lately, so that reading layer by layer does not fetch the header every time."""
        self._books = Books(capacity_bytes, self._sizes)
        self._books.recount()

    @property
    def used_bytes(self) -> int:
        return self._books.used_bytes

    def put(self, key: ObjectKey, info: ObjectInfo, content: memoryview) -> bool:
        """Uploads header and content as one object. False: no room or a fault."""
        record = new_record(key, info, content)
        page = encode_page(record)
        if page is None or self._closed or not self._books.has_room(key, PAGE + record.size):
            return False
        body = b"".join((page, content))
        if self._attempt("write", lambda: self._api.put(self._store, _path(key), body)) is None:
            return False
        self._headers.pop(key, None)
        self._books.stored(key, len(body))
        return True

    def info(self, key: ObjectKey) -> ObjectInfo | None:
        record = self._record(key)
        return None if record is None else record.info()

    def read(self, key: ObjectKey, offset: int, out: memoryview) -> bool:
        """Fills `out` from `offset` on by one ranged request. False: not there, too short, or a fault."""
        record = self._headers.get(key) or self._record(key)
        if record is None or offset < 0 or offset + out.nbytes > record.size:
            return False
        if out.nbytes == 0:
            return True
        found = self._attempt(
            "read", lambda: self._api.get_range(self._store, _path(key), start=PAGE + offset, length=out.nbytes), key
        )
        if found is None or len(found) != out.nbytes:
            return False
        out[:] = memoryview(found)
        return True

    def delete(self, key: ObjectKey) -> bool:
        """Deletes the object. False: it was not there, or a fault."""
        there = self.info(key) is not None
        path = _path(key)
        if self._attempt("delete", lambda: self._api.delete(self._store, path) or True, key) is None:
            return False
        self._forget(key)
        return there

    def objects(self) -> Iterator[tuple[ObjectKey, ObjectInfo]]:
        """Everything under the prefix that can be read, oldest first."""
        listed = self._listed()
        if listed is None:
            return
        keys = [key for _, key, _ in sorted(listed)]
        with ThreadPoolExecutor(HEADER_READERS, "kv-object-store") as pool:
            for first in range(0, len(keys), LIST_PAGE):
                some = keys[first : first + LIST_PAGE]
                for key, record in zip(some, pool.map(self._record, some), strict=True):
                    if record is not None:
                        yield key, record.info()

    def check_integrity(self) -> None:
        """Raises StoreIntegrityError for objects that are not of the length that their header says."""
        wrong = []
        for _, key, size in self._listed() or ():
            record = self._record(key)
            if record is not None and size != PAGE + record.size:
                wrong.append(f"{key.hex()} has {size - PAGE} bytes of {record.size}")
        if wrong:
            raise StoreIntegrityError("object store: " + "; ".join(wrong))

    def close(self) -> None:
        self._closed = True

    def _forget(self, key: ObjectKey) -> None:
        self._headers.pop(key, None)
        self._books.missing(key)

    def _record(self, key: ObjectKey) -> Record | None:
        page = self._attempt("read", lambda: self._api.get_range(self._store, _path(key), start=0, length=PAGE), key)
        found = None if page is None else decode_page(memoryview(page))
        if found is None or found[0].key != key:
            return None
        if len(self._headers) >= HEADERS_KEPT:
            self._headers.clear()
        self._headers[key] = found[0]
        return found[0]

    def _listed(self) -> list[tuple[float, ObjectKey, int]] | None:
        """(time written, key, bytes) of everything under the prefix."""

        def walk() -> list[tuple[float, ObjectKey, int]]:
            """Every object under the prefix: when it was written (seconds since 1970), its key, its bytes with the
            header. Blocks; raises what obstore raises."""
            found = []
            for page in self._api.list(self._store, chunk_size=1000):
                for meta in page:
                    if (key := _key(meta["path"])) is not None:
                        found.append((meta["last_modified"].timestamp(), key, meta["size"]))
            return found

        return self._attempt("list", walk)

    def _sizes(self) -> Iterable[tuple[ObjectKey, int]] | None:
        listed = self._listed()
        return None if listed is None else [(key, size) for _, key, size in listed]

    def _attempt(self, action: str, call: Callable[[], T], key: ObjectKey | None = None) -> T | None:
        """None: the service is down or failed, or has no such object."""
        if self._closed or not self._breaker.allows():
            return None
        try:
            result = call()
        except FileNotFoundError:
            self._breaker.succeeded()
            if key is not None:
                self._forget(key)
            return None
        except (self._api.exceptions.BaseError, OSError, ValueError) as error:
            self._breaker.failed()
            self.faults.report(action, error)
            return None
        self._breaker.succeeded()
        return result


def _path(key: ObjectKey) -> str:
    name = key.hex()
    return f"{name[:2]}/{name}"


def _key(path: str) -> ObjectKey | None:
    try:
        key = ObjectKey(bytes.fromhex(path.rpartition("/")[2]))
    except ValueError:
        return None
    return key if len(key) == KEY_BYTES else None
