"""Objects in Redis or Valkey: for small deployments that have one anyway.

Two strings per object, written in one transaction: `tkv:i:KEY` (the record) and `tkv:d:KEY` (the content, read by
ranges). Redis itself may evict either of the two: an object is there if both are and the lengths agree. A dead server
costs a time-out now and then (circuit breaker); one that comes back empty is a miss.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import islice
from typing import TypeVar

import redis
from redis.backoff import NoBackoff
from redis.client import Pipeline
from redis.connection import PythonRespSerializer
from redis.retry import Retry

from tandem.common.errors import ConfigError
from tandem.kvstore.interfaces import ObjectInfo, ObjectKey, StoreIntegrityError, TierName
from tandem.kvstore.tiers.books import Books
from tandem.kvstore.tiers.breaker import Breaker
from tandem.kvstore.tiers.faults import FaultLog
from tandem.kvstore.tiers.records import KEY_BYTES, Record, decode_body, encode_body, new_record

INFO, CONTENT = b"tkv:i:", b"tkv:d:"
TIMEOUT_S = 1.0
"""Limit to connect, and between two pieces of an answer."""
MAX_CONNECTIONS = 8
MAX_OBJECT_BYTES = 64 << 20
"""Redis works on one command at a time: a larger value would make everybody wait."""
SCAN_COUNT = 1000
MAX_RECORD_BYTES = 64 << 10
"""A longer one is none of ours; no more of it is fetched."""
MAX_LISTED = 8_000_000
"""Keys of one listing."""
PACK_BYTES = 6000
"""Larger pieces of a command are sent from where they lie: hiredis would copy a content several times."""
READ_AHEAD_BYTES = 16 << 20
"""Answers of one pipeline, which redis-py holds all at once."""

T = TypeVar("T")


class RedisTier:
    """Implements `interfaces.Tier`. `capacity_bytes` is for the objects of all processes, without Redis's overhead."""

    name = TierName.REMOTE

    def __init__(
        self,
        url: str,
        capacity_bytes: int,
        *,
        max_object_bytes: int = MAX_OBJECT_BYTES,
        breaker: Breaker | None = None,
    ) -> None:
        """A server that is down is no error. Raises ConfigError for a wrong URL."""
        try:
            pool = redis.BlockingConnectionPool.from_url(
                url,
                max_connections=MAX_CONNECTIONS,
                timeout=TIMEOUT_S,
                socket_timeout=TIMEOUT_S,
                socket_connect_timeout=TIMEOUT_S,
                retry=Retry(NoBackoff(), 0),
                command_packer=PythonRespSerializer(PACK_BYTES, _encoded),
            )
        except ValueError as error:
            raise ConfigError(f"kv_remote: {error}; use redis://HOST:PORT/DB or unix:///PATH") from error
        self._client = redis.Redis(connection_pool=pool)
        self.capacity_bytes = capacity_bytes
        self.max_object_bytes = max_object_bytes
        self.faults = FaultLog("redis tier")
        self._breaker = breaker or Breaker()
        self._closed = False
        self._books = Books(capacity_bytes, self._sizes)
        self._books.recount()

    @property
    def used_bytes(self) -> int:
        return self._books.used_bytes

    def put(self, key: ObjectKey, info: ObjectInfo, content: memoryview) -> bool:
        """Writes both strings in one transaction. False: no room or a fault."""
        record = new_record(key, info, content)
        body = encode_body(record)
        if record.size > self.max_object_bytes or not self._books.has_room(key, record.size + len(body)):
            return False

        def store() -> bool:
            """Writes record and content in one transaction. False: Redis did not take one of them."""
            with self._client.pipeline(transaction=True) as pipe:
                pipe.set(CONTENT + key, content)
                pipe.set(INFO + key, body)
                return all(pipe.execute())

        if not self._attempt("write", store):
            return False
        self._books.stored(key, record.size + len(body))
        return True

    def info(self, key: ObjectKey) -> ObjectInfo | None:
        return self.infos([key])[0]

    def infos(self, keys: Sequence[ObjectKey]) -> list[ObjectInfo | None]:
        """`info` of many keys in one round trip."""
        return [None if record is None else record.info() for record in self._records(keys)]

    def read(self, key: ObjectKey, offset: int, out: memoryview) -> bool:
        return self.read_many([(key, offset, out)])[0]

    def read_many(self, ranges: Sequence[tuple[ObjectKey, int, memoryview]]) -> list[bool]:
        """`read` of many ranges, pipelined."""
        done: list[bool] = []
        for batch in _batches(ranges):
            done.extend(self._read_batch(batch))
        return done

    def delete(self, key: ObjectKey) -> bool:
        """Deletes both strings. False: it was not there, or a fault."""
        there = self.info(key) is not None
        if self._attempt("delete", lambda: int(self._client.delete(INFO + key, CONTENT + key)) + 1) is None:
            return False
        self._books.missing(key)
        return there

    def objects(self) -> Iterator[tuple[ObjectKey, ObjectInfo]]:
        """Everything that is there, in no order: Redis does not know ages."""
        keys = self._attempt("list", self._scan) or []
        for first in range(0, len(keys), SCAN_COUNT):
            some = keys[first : first + SCAN_COUNT]
            for key, info in zip(some, self.infos(some), strict=True):
                if info is not None:
                    yield key, info

    def check_integrity(self) -> None:
        """What Redis dropped is no defect; a content of another length than its record says is."""
        wrong = []
        for key in self._attempt("list", self._scan) or []:
            answers = self._attempt("read", partial(self._bodies, [key]))
            if not answers:
                return
            body, size = answers[0]
            record = decode_body(body) if body else None
            if body and (record is None or record.key != key):
                wrong.append(f"{key.hex()} has no valid record")
            elif record is not None and size not in (0, record.size):
                wrong.append(f"{key.hex()} has {size} bytes of {record.size}")
        if wrong:
            raise StoreIntegrityError("redis: " + "; ".join(wrong))

    def close(self) -> None:
        self._closed = True
        self._client.connection_pool.disconnect()

    def _read_batch(self, batch: Sequence[tuple[ObjectKey, int, memoryview]]) -> list[bool]:
        def fetch() -> list[bytes]:
            """The wanted range of each content in the batch, in one round trip; empty where Redis has none. Every range
            is at least one byte, so that "nothing there" differs from "nothing wanted"."""
            with self._client.pipeline(transaction=False) as pipe:
                for key, offset, out in batch:
                    pipe.getrange(CONTENT + key, max(offset, 0), offset + max(out.nbytes, 1) - 1)
                return [answer if isinstance(answer, bytes) else b"" for answer in self._answers(pipe)]

        answers = self._attempt("read", fetch)
        if answers is None:
            return [False] * len(batch)
        done = []
        for (key, offset, out), answer in zip(batch, answers, strict=True):
            if out.nbytes == 0:
                info = self.info(key)
                done.append(info is not None and 0 <= offset <= info.size)
            elif offset < 0 or len(answer) != out.nbytes:
                done.append(False)
            else:
                out[:] = answer
                done.append(True)
        return done

    def _records(self, keys: Sequence[ObjectKey]) -> list[Record | None]:
        answers = self._attempt("read", lambda: self._bodies(keys))
        if answers is None:
            return [None] * len(keys)
        records: list[Record | None] = []
        for key, (body, size) in zip(keys, answers, strict=True):
            record = decode_body(body) if body else None
            valid = record is not None and record.key == key and record.size == size
            records.append(record if valid else None)
            if not valid:
                self._books.missing(key)
        return records

    def _bodies(self, keys: Sequence[ObjectKey]) -> list[tuple[bytes | None, int]]:
        """Record and content length of each."""
        with self._client.pipeline(transaction=False) as pipe:
            for key in keys:
                pipe.getrange(INFO + key, 0, MAX_RECORD_BYTES - 1)
                pipe.strlen(CONTENT + key)
            answers = self._answers(pipe)
        return [
            (body, size) if isinstance(body, bytes) and isinstance(size, int) else (None, 0)
            for body, size in zip(answers[::2], answers[1::2], strict=True)
        ]

    def _answers(self, pipe: Pipeline) -> list[object]:
        """One that is refused, because its key has another type, does not spoil those of other keys."""
        answers: list[object] = pipe.execute(raise_on_error=False)
        refused = next((answer for answer in answers if isinstance(answer, redis.ResponseError)), None)
        if refused is not None:
            self.faults.report("read", refused)
        return answers

    def _scan(self) -> list[ObjectKey]:
        keys = islice(self._client.scan_iter(match=INFO + b"?" * KEY_BYTES, count=SCAN_COUNT), MAX_LISTED)
        return [ObjectKey(key) for key in {key[len(INFO) :] for key in keys}]

    def _sizes(self) -> Iterable[tuple[ObjectKey, int]] | None:
        keys = self._attempt("list", self._scan)
        if keys is None:
            return None
        sizes: list[tuple[ObjectKey, int]] = []
        for first in range(0, len(keys), SCAN_COUNT):
            some = keys[first : first + SCAN_COUNT]
            answers = self._attempt("list", partial(self._bodies, some))
            if answers is None:
                return None
            sizes.extend((key, len(body or b"") + size) for key, (body, size) in zip(some, answers, strict=True))
        return sizes

    def _attempt(self, action: str, call: Callable[[], T]) -> T | None:
        """None: the server is down or refused."""
        if self._closed or not self._breaker.allows():
            return None
        try:
            result = call()
        except redis.ResponseError as error:
            self._breaker.succeeded()
            self.faults.report(action, error)
            return None
        except (redis.RedisError, OSError) as error:
            self._breaker.failed()
            self.faults.report(action, error)
            return None
        self._breaker.succeeded()
        return result


def _encoded(value: bytes | memoryview | str | float) -> bytes | memoryview:
    return value if isinstance(value, (bytes, memoryview)) else str(value).encode()


def _batches(
    ranges: Sequence[tuple[ObjectKey, int, memoryview]],
) -> Iterator[list[tuple[ObjectKey, int, memoryview]]]:
    batch: list[tuple[ObjectKey, int, memoryview]] = []
    size = 0
    for item in ranges:
        if batch and size + item[2].nbytes > READ_AHEAD_BYTES:
            yield batch
            batch, size = [], 0
        batch.append(item)
        size += item[2].nbytes
    if batch:
        yield batch
