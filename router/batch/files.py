"""The bytes of files, and the one thread on which the index is used.

    FOLDER/index.sqlite     see store.py
    FOLDER/files/ID         uploaded files, results of batches (these grow while the batch runs)
    FOLDER/files/.ID        uploads that have not ended
    FOLDER/lane.lock        held by the router process that runs batches

A file exists for users once its record is in the index; bytes without a record are swept away.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sqlite3
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO, TypeVar

from tandem.common.errors import ConfigError, TandemError
from tandem.common.private import private_file, private_folder, private_opener
from tandem.router.batch.records import FileRecord, new_id
from tandem.router.batch.store import Index

INDEX = "index.sqlite"
MAX_FILE_BYTES = 200 << 20
"""Bytes of one uploaded file, as OpenAI's batches."""
MAX_UPLOADS = 32
"""Uploads at once; each holds PART_BYTES of memory. A tenant may have as many as are left free then: one alone half of
them, and whoever comes next finds a place."""
PART_BYTES = 1 << 20
ORPHAN_S = 24 * 3600.0
"""Bytes without a record are dropped when they have not changed for so long."""

T = TypeVar("T")


class Storage:
    """Used on one event loop. Every call raises TandemError `unavailable` where the disk fails."""

    def __init__(self, folder: Path) -> None:
        """Raises ConfigError where the folder cannot be used."""
        self.folder = folder
        self._files = folder / "files"
        self._thread = ThreadPoolExecutor(1, "batch-storage")
        self._uploads: Counter[str] = Counter()
        """Counts by tenant."""
        self._closed = False
        try:
            private_folder(folder)
            private_folder(self._files)
            private_file(folder / INDEX)  # SQLite gives the files that it adds the same mode
            self._index = self._thread.submit(Index, folder / INDEX).result()
        except (OSError, sqlite3.Error) as error:
            self._thread.shutdown()
            raise ConfigError(f"--storage {folder}: cannot be used ({error})") from error

    def path(self, name: str) -> Path:
        return self._files / name

    async def call(self, work: Callable[[Index], T]) -> T:
        """Runs `work` after everything that was asked for before."""
        if self._closed:
            raise TandemError("unavailable", "the router is stopping", retry_after_s=1.0)
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, work, self._index)
        except (OSError, sqlite3.Error) as error:
            raise broken(error) from error

    async def close(self) -> None:
        """Idempotent; afterwards every call is `unavailable`."""
        if not self._closed:
            self._closed = True
            await asyncio.get_running_loop().run_in_executor(self._thread, self._index.close)
            self._thread.shutdown(wait=False)

    @contextlib.asynccontextmanager
    async def upload(self, tenant: str) -> AsyncIterator[Upload]:
        """What is not finished inside the `with` is dropped. Raises TandemError `overloaded`, `rate_limit_exceeded`."""
        mine = self._uploads[tenant]
        if mine >= MAX_UPLOADS - self._uploads.total():
            raise TandemError("overloaded", f"{mine} files of `{tenant}` are being uploaded; try again shortly")
        self._uploads[tenant] += 1
        try:
            await self.call(lambda index: index.check_room(tenant, 0))
            upload = Upload(self, tenant)
            try:
                yield upload
            finally:
                upload.close()
        finally:
            self._uploads[tenant] -= 1
            if not self._uploads[tenant]:
                del self._uploads[tenant]

    async def content(self, file_id: str) -> AsyncIterator[bytes]:
        """Raises TandemError."""
        try:
            file = await asyncio.to_thread(self.path(file_id).open, "rb")
            with file:
                while part := await asyncio.to_thread(file.read, PART_BYTES):
                    yield part
        except OSError as error:
            raise broken(error) from error

    async def delete(self, tenant: str, file_id: str) -> None:
        """Raises TandemError `not_found`, or `invalid_request` while a batch reads it."""

        def delete(index: Index) -> None:
            index.delete_file(tenant, file_id, time.time())
            self.path(file_id).unlink(missing_ok=True)

        await self.call(delete)

    async def sweep(self, *, kept_s: float) -> None:
        """Drops what has expired, and bytes that belong to nobody (what a crash left)."""
        now = time.time()

        def sweep(index: Index) -> None:
            """Deletes files that have expired, and those that the index does not know and that are older than
            `ORPHAN_S`."""
            for file_id in index.drop_expired(now, now - kept_s):
                self.path(file_id).unlink(missing_ok=True)
            known = index.known_names()
            for path in self._files.iterdir():
                if path.name not in known and path.stat().st_mtime < now - ORPHAN_S:
                    path.unlink(missing_ok=True)

        await self.call(sweep)


class Upload:
    """One file on its way in. Written beside its place, so that half a file is never found."""

    def __init__(self, storage: Storage, tenant: str) -> None:
        self.size = 0
        self._storage = storage
        self._tenant = tenant
        self._id = new_id("file")
        self._partial = storage.path(f".{self._id}")
        self._file: BinaryIO | None = None
        self._buffer = bytearray()

    async def write(self, data: bytes) -> None:
        """Raises TandemError `request_too_large`, `unavailable`."""
        self.size += len(data)
        if self.size > MAX_FILE_BYTES:
            raise TandemError(
                "request_too_large", f"the file is larger than {MAX_FILE_BYTES} bytes; split it", param="file"
            )
        self._buffer += data
        if len(self._buffer) >= PART_BYTES:
            await self._flush()

    async def finish(self, filename: str, expires_after_s: int) -> FileRecord:
        """Raises TandemError `rate_limit_exceeded` where the tenant stores too much, `unavailable`."""
        await self._flush()
        now = int(time.time())
        record = FileRecord(
            id=self._id,
            tenant=self._tenant,
            filename=filename,
            purpose="batch",
            bytes=self.size,
            created_at=now,
            expires_at=now + expires_after_s,
        )

        def register(index: Index) -> None:
            """Gives the upload its final name once it is on disk, and lists it in the index. Where that fails the file
            is removed again."""
            assert self._file is not None
            os.fsync(self._file.fileno())
            place = self._storage.path(self._id)
            self._partial.rename(place)
            try:
                index.add_file(record)
            except BaseException:
                place.unlink(missing_ok=True)
                raise

        await self._storage.call(register)
        return record

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._partial.unlink(missing_ok=True)

    async def _flush(self) -> None:
        part, self._buffer = self._buffer, bytearray()
        try:
            if self._file is None:
                self._file = await asyncio.to_thread(open, self._partial, "wb", 0, opener=private_opener)
            await asyncio.to_thread(write_all, self._file.fileno(), part)
        except OSError as error:
            raise broken(error) from error


def write_all(descriptor: int, data: bytes | bytearray) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


def broken(error: OSError | sqlite3.Error) -> TandemError:
    return TandemError("unavailable", f"the router's storage cannot be used ({error})"[:300], retry_after_s=30.0)
