"""The disk tier: a log of segments. Survives a restart, stays within its bytes, and does not mind being killed.

Objects are appended to the newest segment; an index in memory says where. It is rebuilt from the header pages alone,
one small read per object: at start, or `later`, while what is not in it yet is a miss. Deleting marks the header page
in place. A segment without live records is removed; when files take too much, live records move out of the segment
with the most dead bytes.

`capacity_bytes` is what live records may take: an eighth of the directory's bytes is left for dead ones, so that a put
moves at most about seven times its own size, and one segment for the moving itself. The files never take more than
the bytes that were asked for.

No fsync: after a power failure the newest objects may be missing or have wrong content, which readers find by checksum.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import threading
from collections import deque
from collections.abc import Iterator
from pathlib import Path

from msgspec.structs import replace

from tandem.common.errors import ConfigError
from tandem.common.private import private_folder
from tandem.kvstore.interfaces import ObjectInfo, ObjectKey, StoreIntegrityError, TierName
from tandem.kvstore.tiers.blockfile import Staging, takes_direct_io
from tandem.kvstore.tiers.faults import FaultLog
from tandem.kvstore.tiers.records import DEAD, PAGE, Record, decode_page, encode_page, new_record, padded
from tandem.kvstore.tiers.segment import SUFFIX, Segment

SMALLEST_BYTES = 16 * PAGE
USUAL_SEGMENT_BYTES = 256 << 20
FEWEST_SEGMENTS = 32
MOST_SEGMENTS = 256
"""Each costs two file descriptors."""


def segment_bytes(directory_bytes: int) -> int:
    size = max(min(USUAL_SEGMENT_BYTES, directory_bytes // FEWEST_SEGMENTS), directory_bytes // MOST_SEGMENTS)
    return max(size // PAGE, 2) * PAGE


class DiskTier:
    """Implements `interfaces.Tier`. Any number of threads; one process per directory."""

    name = TierName.DISK

    def __init__(self, directory: str | Path, capacity_bytes: int, *, later: bool = False) -> None:
        """Raises ConfigError if the directory cannot be used. `later`: the first `objects` takes up what is there, and
        nothing is stored before it has ended."""
        if capacity_bytes < SMALLEST_BYTES:
            raise ConfigError(f"kv_disk_bytes is {capacity_bytes}; a disk tier needs at least {SMALLEST_BYTES}")
        self.directory = Path(directory)
        self.directory_bytes = capacity_bytes
        self.segment_bytes = segment_bytes(capacity_bytes)
        self.capacity_bytes = (capacity_bytes - self.segment_bytes) // 8 * 7
        self.faults = FaultLog(f"disk tier {directory}")
        self.moved_bytes = 0
        """Copied to make room, since the start."""
        self._staging = Staging()
        self._write_lock = threading.Lock()
        """Held by whoever appends. Taken before `_lock`."""
        self._lock = threading.Lock()
        """The books. Never held during I/O, except by `check_integrity`."""
        self._index: dict[ObjectKey, Record] = {}
        self._segments: dict[int, Segment] = {}
        self._active: Segment | None = None
        self._live_bytes = 0
        self._file_bytes = 0
        self._next_segment = 1
        self._next_sequence = 1
        self._closed = False
        self._is_loading = False
        self._is_loaded = False
        self._lock_fd = self._claim()
        try:
            self.direct_io = takes_direct_io(self.directory)
            if not later:
                deque(self._load(), maxlen=0)
        except OSError as error:
            os.close(self._lock_fd)
            raise ConfigError(f"kv_disk: cannot use {directory}: {error.strerror}; choose a writable folder") from error

    @property
    def used_bytes(self) -> int:
        return self._live_bytes

    def put(self, key: ObjectKey, info: ObjectInfo, content: memoryview) -> bool:
        """Appends a record, moving others where files take too much. False: no room or a fault."""
        record = new_record(key, info, content)
        with self._write_lock:
            if self._closed or not self._is_loaded:
                return False
            if not self._make_room(key, padded(record.size)):
                return False
            placed = self._append(replace(record, sequence=self._next_sequence), content)
            if placed is None:
                return False
            self._next_sequence += 1
            with self._lock:
                old = self._index.pop(key, None)
                self._enter(placed)
            if old is not None:
                self._retire(old)
            return True

    def info(self, key: ObjectKey) -> ObjectInfo | None:
        record = self._index.get(key)
        return None if record is None else record.info()

    def read(self, key: ObjectKey, offset: int, out: memoryview) -> bool:
        """Fills `out` from `offset` on, straight from the file. False: not there, too short, or a fault."""
        with self._lock:
            record = self._index.get(key)
            if record is None or offset < 0 or offset + out.nbytes > record.size:
                return False
            segment = self._segments[record.segment]
            segment.readers += 1
        try:
            if out.nbytes:
                segment.file.read(record.offset + PAGE + offset, out)
            return True
        except OSError as error:
            self.faults.report("read", error)
            return False
        finally:
            self._release(segment)

    def delete(self, key: ObjectKey) -> bool:
        """Takes it out of the index and marks it dead. False: it was not there."""
        with self._lock:
            record = self._index.pop(key, None)
        if record is None:
            return False
        self._retire(record)
        return True

    def objects(self) -> Iterator[tuple[ObjectKey, ObjectInfo]]:
        """Everything in the index, oldest first. The first time, where that was left for `later`, file by file."""
        if not self._is_loading:
            yield from self._load()
            return
        with self._lock:
            records = list(self._index.items())
        for key, record in sorted(records, key=lambda item: item[1].sequence):
            yield key, record.info()

    def check_integrity(self) -> None:
        """Raises StoreIntegrityError where index, books and files differ."""
        if not self._is_loaded:
            return
        with self._write_lock, self._lock:
            wrong = self._wrong()
        if wrong:
            raise StoreIntegrityError(f"{self.directory}: " + "; ".join(wrong))

    def close(self) -> None:
        """Closes the files and gives the folder back. Idempotent."""
        with self._write_lock:
            if self._closed:
                return
            with self._lock:
                self._closed = True
                segments = list(self._segments.values())
                self._index.clear()
                self._segments.clear()
                self._active = None
                for segment in segments:
                    segment.gone = True
                    segment.readers += 1
            for segment in segments:
                self._release(segment)
            os.close(self._lock_fd)

    def _claim(self) -> int:
        try:
            private_folder(self.directory)
            fd = os.open(self.directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise ConfigError(
                f"kv_disk: cannot use {self.directory}: {error.strerror}; choose a folder that can be written"
            ) from error
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(fd)
            raise ConfigError(
                f"kv_disk: {self.directory} is in use by another process; give each store node a folder of its own"
            ) from error
        return fd

    def _load(self) -> Iterator[tuple[ObjectKey, ObjectInfo]]:
        """Puts what the files hold into the index, one file after the other, and tells of each once it is there."""
        self._is_loading = True
        for path in sorted(self.directory.glob(f"*{SUFFIX}")):
            if not path.stem.isdecimal():
                continue
            self._next_segment = max(self._next_segment, int(path.stem) + 1)
            try:
                segment = Segment.open(path, self._staging, self.direct_io)
            except OSError as error:
                self.faults.report(f"open {path.name}, which is left out", error)
                continue
            try:
                found = sorted(segment.scan(), key=lambda record: record.sequence)
            except OSError as error:
                self.faults.report(f"read {path.name}, which is left out", error)
                segment.file.close()
                continue
            with self._lock:
                self._segments[segment.number] = segment
                self._file_bytes += segment.size
                segment.readers += 1
            taken = [record for record in found if self._take_up(record)]
            self._release(segment)
            yield from ((ObjectKey(record.key), record.info()) for record in taken)
        newest = self._segments.get(self._next_segment - 1)
        if newest is not None and newest.size < self.segment_bytes:
            self._active = newest
        self._is_loaded = True

    def _take_up(self, record: Record) -> bool:
        """A record that was found in a file, unless a later one of its key is known."""
        key = ObjectKey(record.key)
        with self._lock:
            self._next_sequence = max(self._next_sequence, record.sequence + 1)
            self._count_live(record)
            old = self._index.get(key)
            is_later = old is None or old.sequence <= record.sequence
            if is_later:
                self._index.pop(key, None)
                self._enter(record)
        if old is not None:
            self._retire(old if is_later else record)
        return is_later

    def _make_room(self, key: ObjectKey, need: int) -> bool:
        """Moves records until `need` bytes can be appended. Called under the write lock."""
        old = self._index.get(key)
        if self._live_bytes - (padded(old.size) if old else 0) + need > self.capacity_bytes:
            return False
        while self._file_bytes + need > self.directory_bytes - self.segment_bytes:
            with self._lock:
                victim = max(self._segments.values(), key=lambda segment: segment.dead_bytes, default=None)
            if victim is None or victim.dead_bytes == 0 or not self._empty(victim):
                return False
        return True

    def _empty(self, victim: Segment) -> bool:
        """Moves the live records out of a segment, which removes it. False: the disk failed."""
        with self._lock:
            victim.readers += 1
            if victim is self._active:
                self._active = None
            records = [self._index[key] for key in victim.keys if key in self._index]
        try:
            for record in records:
                if not self._move(record, victim):
                    return False
        finally:
            self._release(victim)
        return victim.gone

    def _move(self, record: Record, source: Segment) -> bool:
        key = ObjectKey(record.key)
        with mmap.mmap(-1, padded(record.size)) as buffer, memoryview(buffer)[: record.size] as content:
            try:
                if record.size:
                    source.file.read(record.offset + PAGE, content)
            except OSError as error:
                self.faults.report("move a record, which is lost", error)
                moved = None
            else:
                moved = self._append(record, content)
                if moved is None:
                    return False
                self.moved_bytes += padded(record.size)
        with self._lock:
            current = self._index.get(key) is record
            if current and moved is not None:
                self._index[key] = moved
                self._segments[moved.segment].keys[key] = None
            elif current:
                del self._index[key]
        if current:
            self._retire(record)
        elif moved is not None:
            self._retire(moved)
        return True

    def _append(self, record: Record, content: memoryview) -> Record | None:
        """Writes it to the newest segment and counts it; the index is the caller's. Called under the write lock."""
        try:
            segment = self._segment_for(padded(record.size))
            placed = replace(record, segment=segment.number, offset=segment.size)
            page = encode_page(placed)
            if page is None:
                return None
            segment.write(page, content)
        except OSError as error:
            self.faults.report("write", error)
            return None
        with self._lock:
            segment.size += padded(record.size)
            self._file_bytes += padded(record.size)
            self._count_live(placed)
        return placed

    def _segment_for(self, need: int) -> Segment:
        active = self._active
        if active is not None and not active.sealed and (active.size == 0 or active.size + need <= self.segment_bytes):
            return active
        number = self._next_segment
        self._next_segment += 1
        fresh = Segment.create(self.directory, number, self._staging, self.direct_io)
        with self._lock:
            self._segments[fresh.number] = self._active = fresh
            if active is not None:
                active.readers += 1
        if active is not None:
            self._release(active)
        return fresh

    def _count_live(self, record: Record) -> None:
        segment = self._segments[record.segment]
        segment.live_bytes += padded(record.size)
        self._live_bytes += padded(record.size)

    def _enter(self, record: Record) -> None:
        """A new record is in the index. Called under `_lock`."""
        key = ObjectKey(record.key)
        self._index[key] = record
        self._segments[record.segment].keys[key] = None

    def _retire(self, record: Record) -> None:
        """A record that has left the index is dead, also after a restart; if the disk refuses the mark it comes back
        then, which is harmless: equal keys mean equal content."""
        with self._lock:
            segment = self._segments.get(record.segment)
            if segment is None:
                return
            segment.readers += 1
            segment.live_bytes -= padded(record.size)
            self._live_bytes -= padded(record.size)
            moved = self._index.get(ObjectKey(record.key))
            if moved is None or moved.segment != record.segment:
                segment.keys.pop(ObjectKey(record.key), None)
        try:
            segment.file.set_state(record.offset, DEAD)
        except OSError as error:
            self.faults.report("mark a record as deleted", error)
        self._release(segment)

    def _release(self, segment: Segment) -> None:
        """One reader leaves; a segment without live records goes with its last one."""
        with self._lock:
            segment.readers -= 1
            empty = segment.live_bytes == 0 and segment is not self._active and not segment.gone
            if empty:
                segment.gone = True
                del self._segments[segment.number]
                self._file_bytes -= segment.size
            close = segment.gone and segment.readers == 0
        if empty:
            try:
                segment.file.path.unlink(missing_ok=True)
            except OSError as error:
                self.faults.report("remove a segment", error)
        if close:
            segment.file.close()

    def _wrong(self) -> list[str]:
        wrong: list[str] = []
        live = dict.fromkeys(self._segments, 0)
        for key, record in self._index.items():
            segment = self._segments.get(record.segment)
            if segment is None:
                wrong.append(f"{key.hex()} lies in segment {record.segment}, which is gone")
                continue
            live[record.segment] += padded(record.size)
            if decode_page(segment.file.read_page(record.offset)) != (record, True):
                wrong.append(f"{key.hex()} has another header on the disk")
            if key not in segment.keys or record.offset + padded(record.size) > segment.size:
                wrong.append(f"{key.hex()} is not in the books of segment {record.segment}")
        for number, segment in self._segments.items():
            if live[number] != segment.live_bytes:
                wrong.append(f"segment {number} counts {segment.live_bytes} live bytes and has {live[number]}")
            if segment.file.size() < segment.size:
                wrong.append(f"segment {number} counts {segment.size} bytes and has {segment.file.size()}")
            if segment.readers < 0:
                wrong.append(f"segment {number} has {segment.readers} readers")
        if sum(live.values()) != self._live_bytes:
            wrong.append(f"{self._live_bytes} live bytes are counted and {sum(live.values())} are there")
        if (size := sum(segment.size for segment in self._segments.values())) != self._file_bytes:
            wrong.append(f"{self._file_bytes} file bytes are counted and {size} are there")
        return wrong
