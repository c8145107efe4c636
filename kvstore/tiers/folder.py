"""An object store in a local or mounted folder: one file per object, shared by any number of processes.

A file is a header page and the content. It gets its name only when it is whole, so readers see all of it or nothing.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from tandem.common.errors import ConfigError
from tandem.common.private import private_opener
from tandem.kvstore.interfaces import ObjectInfo, ObjectKey, StoreIntegrityError, TierName
from tandem.kvstore.tiers.books import Books
from tandem.kvstore.tiers.faults import FaultLog
from tandem.kvstore.tiers.records import KEY_BYTES, PAGE, Record, decode_page, encode_page, new_record

UNFINISHED = ".part"
ABANDONED_AFTER_S = 3600.0


class FolderTier:
    """Implements `interfaces.Tier`. `capacity_bytes` is for the whole folder, whoever filled it."""

    name = TierName.REMOTE

    def __init__(self, directory: str | Path, capacity_bytes: int) -> None:
        """Raises ConfigError if the folder cannot be used."""
        self.directory = Path(directory)
        self.capacity_bytes = capacity_bytes
        self.faults = FaultLog(f"folder tier {directory}")
        self._unique = itertools.count()
        self._closed = False
        try:
            self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)  # one that is there may be shared
            probe = self._unfinished()
            probe.touch()
            probe.unlink()
            self._remove_abandoned()
        except OSError as error:
            raise ConfigError(
                f"kv_remote: cannot use the folder {directory}: {error.strerror}; choose one that can be written"
            ) from error
        self._books = Books(capacity_bytes, self._sizes)
        self._books.recount()

    @property
    def used_bytes(self) -> int:
        return self._books.used_bytes

    def put(self, key: ObjectKey, info: ObjectInfo, content: memoryview) -> bool:
        """Writes a file aside and renames it. False: no room or a fault."""
        record = new_record(key, info, content)
        page = encode_page(record)
        if self._closed or page is None or not self._books.has_room(key, PAGE + record.size):
            return False
        unfinished = self._unfinished()
        try:
            path = self._path(key)
            path.parent.mkdir(mode=0o700, exist_ok=True)
            with open(unfinished, "xb", buffering=0, opener=private_opener) as file:
                for piece in (memoryview(page), content):
                    done = 0
                    while done < piece.nbytes:
                        done += file.write(piece[done:])
            unfinished.rename(path)
        except OSError as error:
            self.faults.report("write", error)
            with contextlib.suppress(OSError):
                unfinished.unlink(missing_ok=True)
            return False
        self._books.stored(key, PAGE + record.size)
        return True

    def info(self, key: ObjectKey) -> ObjectInfo | None:
        with self._opened(key) as found:
            return None if found is None else found[1].info()

    def read(self, key: ObjectKey, offset: int, out: memoryview) -> bool:
        """Fills `out` from `offset` on. False: not there, too short, or a fault."""
        with self._opened(key) as found:
            if found is None:
                return False
            fd, record = found
            if offset < 0 or offset + out.nbytes > record.size:
                return False
            done = 0
            try:
                while done < out.nbytes:
                    count = os.preadv(fd, [out[done:]], PAGE + offset + done)
                    if count == 0:
                        return False
                    done += count
            except OSError as error:
                self.faults.report("read", error)
                return False
            return True

    def delete(self, key: ObjectKey) -> bool:
        """Removes the file. False: it was not there, or a fault."""
        try:
            alive = self.info(key) is not None
            self._path(key).unlink()
        except FileNotFoundError:
            alive = False
        except OSError as error:
            self.faults.report("delete", error)
            return False
        self._books.missing(key)
        return alive

    def objects(self) -> Iterator[tuple[ObjectKey, ObjectInfo]]:
        """Everything in the folder that can be read, oldest first."""
        dated = sorted((stat.st_mtime_ns, key) for key, stat in self._files())
        for _, key in dated:
            if (info := self.info(key)) is not None:
                yield key, info

    def check_integrity(self) -> None:
        """Raises StoreIntegrityError for files that are no objects."""
        wrong = []
        for key, stat in self._files():
            with self._opened(key) as found:
                if found is not None and stat.st_size != PAGE + found[1].size:
                    wrong.append(f"{key.hex()} has {stat.st_size - PAGE} bytes of {found[1].size}")
                elif found is None and self._path(key).exists():
                    wrong.append(f"{key.hex()} has no valid header")
        if wrong:
            raise StoreIntegrityError(f"{self.directory}: " + "; ".join(wrong))

    def close(self) -> None:
        self._closed = True

    @contextlib.contextmanager
    def _opened(self, key: ObjectKey) -> Iterator[tuple[int, Record] | None]:
        """The file of an object and its header; None if there is none that is valid."""
        if self._closed:
            yield None
            return
        try:
            fd = os.open(self._path(key), os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            if isinstance(error, FileNotFoundError):
                self._books.missing(key)
            else:
                self.faults.report("open", error)
            yield None
            return
        try:
            try:
                found = decode_page(os.pread(fd, PAGE, 0))
            except OSError as error:
                self.faults.report("read", error)
                found = None
            valid = found is not None and found[0].key == key
            yield (fd, found[0]) if found is not None and valid else None
        finally:
            os.close(fd)

    def _path(self, key: ObjectKey) -> Path:
        name = key.hex()
        return self.directory / name[:2] / name

    def _unfinished(self) -> Path:
        return self.directory / f"{os.uname().nodename}-{os.getpid()}-{id(self)}-{next(self._unique)}{UNFINISHED}"

    def _files(self) -> Iterator[tuple[ObjectKey, os.stat_result]]:
        """Objects whose files are there, in no order. Faults end the walk."""
        try:
            for path in self.directory.glob("??/*"):
                try:
                    key = ObjectKey(bytes.fromhex(path.name))
                    if len(key) == KEY_BYTES:
                        yield key, path.stat()
                except (ValueError, FileNotFoundError):
                    continue
        except OSError as error:
            self.faults.report("list the folder", error)

    def _sizes(self) -> Iterable[tuple[ObjectKey, int]]:
        return [(key, stat.st_size) for key, stat in self._files()]

    def _remove_abandoned(self) -> None:
        """What writers that died have left behind."""
        for path in self.directory.glob(f"*{UNFINISHED}"):
            with contextlib.suppress(FileNotFoundError):
                if time.time() - path.stat().st_mtime > ABANDONED_AFTER_S:
                    path.unlink()
