"""A segment of the disk tier: a file to which whole records are appended, and what is known about it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from tandem.kvstore.interfaces import ObjectKey
from tandem.kvstore.tiers.blockfile import BlockFile, Staging
from tandem.kvstore.tiers.records import PAGE, Record, decode_page, padded

SUFFIX = ".seg"


class Segment:
    """The books are kept by the tier under its lock; the file may be read without it while `readers` says so."""

    def __init__(self, number: int, file: BlockFile) -> None:
        self.number = number
        self.file = file
        self.size = 0
        """Bytes of the file that are taken by records, dead ones included."""
        self.live_bytes = 0
        self.keys: dict[ObjectKey, None] = {}
        """Keys of the live records, in the order in which the records were written."""
        self.readers = 0
        self.gone = False
        """No longer a part of the tier: closed as soon as the last reader leaves."""
        self.sealed = False
        """A fault may have left bytes at its end, so nothing is appended."""

    @property
    def dead_bytes(self) -> int:
        return self.size - self.live_bytes

    @classmethod
    def create(cls, directory: Path, number: int, staging: Staging, direct: bool) -> Segment:
        return cls(number, BlockFile(directory / f"{number:010d}{SUFFIX}", staging, direct, create=True))

    @classmethod
    def open(cls, path: Path, staging: Staging, direct: bool) -> Segment:
        """Raises OSError. The name is the number."""
        return cls(int(path.stem), BlockFile(path, staging, direct))

    def scan(self) -> Iterator[Record]:
        """Live records, by their header pages alone; at the end cuts off what is no whole record.

        A damaged header costs its own record only: the next one is looked for page by page. Headers name their own
        place, so bytes inside an object are never mistaken for one.
        """
        end, position = self.file.size(), 0
        while position + PAGE <= end:
            found = decode_page(self.file.read_page(position))
            if found is None or not self._belongs(found[0], position, end):
                position += PAGE
                continue
            record, live = found
            position += padded(record.size)
            self.size = position
            if live:
                yield record
        if self.size < end:
            self.file.truncate(self.size)

    def _belongs(self, record: Record, position: int, end: int) -> bool:
        whole = position + padded(record.size) <= end
        return whole and (record.segment, record.offset) == (self.number, position)

    def write(self, page: bytes, content: memoryview) -> None:
        """Writes behind the last record. Raises OSError with nothing left behind that could be taken for a record."""
        try:
            self.file.write_record(self.size, page, content)
        except OSError:
            self.sealed = True
            self.file.truncate(self.size)
            self.sealed = False
            raise
