"""The index of files and batches: an SQLite database that the router processes of one machine share.

Everything here blocks, and belongs on the thread of `Storage`. Each method is one transaction: after a crash at any
point the index is as it was before or after it.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import msgspec

from tandem.common.errors import TandemError
from tandem.router.batch.records import UNFINISHED, BatchRecord, FileRecord

MAX_TENANT_BYTES = 16 << 30
"""All files of a tenant together."""
MAX_TENANT_FILES = 10_000
MAX_UNFINISHED = 100
"""Batches of a tenant that wait or run."""
MAX_ENDED = 10_000
"""Batches of a tenant that have ended and are still remembered. Beyond it, those that ended first are forgotten."""
MAX_ENDED_BYTES = 64 << 20
"""Their records together: metadata and errors may be large."""
BUSY_S = 10.0
"""How long another process may hold the database."""

Order = Literal["asc", "desc"]

_SCHEMA = """
CREATE TABLE IF NOT EXISTS files (
    seq INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT UNIQUE NOT NULL, tenant TEXT NOT NULL, purpose TEXT NOT NULL,
    bytes INTEGER NOT NULL, expires_at INTEGER NOT NULL, record BLOB NOT NULL
);
CREATE INDEX IF NOT EXISTS files_of_tenant ON files (tenant, seq);
CREATE TABLE IF NOT EXISTS batches (
    seq INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT UNIQUE NOT NULL, tenant TEXT NOT NULL, status TEXT NOT NULL,
    input_file_id TEXT NOT NULL, record BLOB NOT NULL
);
CREATE INDEX IF NOT EXISTS batches_of_tenant ON batches (tenant, seq);
CREATE INDEX IF NOT EXISTS batches_by_status ON batches (status, seq);
"""
_UNFINISHED = "status IN (" + ", ".join(f"'{status}'" for status in UNFINISHED) + ")"
_FILE = msgspec.json.Decoder(FileRecord)
_BATCH = msgspec.json.Decoder(BatchRecord)


class Index:
    """Raises sqlite3.Error where the disk or the database fails."""

    def __init__(self, path: Path) -> None:
        self._db = sqlite3.connect(path, timeout=BUSY_S, isolation_level=None)
        self._db.execute("PRAGMA journal_mode = WAL")
        self._db.executescript(_SCHEMA)

    def close(self) -> None:
        self._db.close()

    # Files

    def add_file(self, record: FileRecord) -> None:
        """Raises TandemError `rate_limit_exceeded` where the tenant stores too much."""
        with self._db:
            self._db.execute("BEGIN IMMEDIATE")
            self.check_room(record.tenant, record.bytes)
            self._insert_file(record)

    def check_room(self, tenant: str, size: int) -> None:
        """Raises TandemError `rate_limit_exceeded` where `size` bytes more are too many."""
        row = self._db.execute("SELECT COUNT(*), COALESCE(SUM(bytes), 0) FROM files WHERE tenant = ?", (tenant,))
        count, stored = row.fetchone()
        if count >= MAX_TENANT_FILES or stored + size > MAX_TENANT_BYTES:
            raise TandemError(
                "rate_limit_exceeded",
                f"{count} files with {stored} bytes are stored, of at most {MAX_TENANT_FILES} files and "
                f"{MAX_TENANT_BYTES} bytes; delete some first",
                param="file",
            )

    def file(self, tenant: str, file_id: str, now: float) -> FileRecord:
        """Raises TandemError `not_found`, also for what has expired or is another tenant's."""
        row = self._db.execute(
            "SELECT record FROM files WHERE id = ? AND tenant = ? AND expires_at > ?", (file_id, tenant, now)
        ).fetchone()
        if row is None:
            raise TandemError("not_found", f"There is no file `{file_id[:64]}`.", param="file_id")
        return _FILE.decode(row[0])

    def files(
        self, tenant: str, now: float, *, purpose: str, after: str, limit: int, order: Order
    ) -> tuple[list[FileRecord], bool]:
        """Files of a tenant, at most `limit`, and whether there are more. Empty `purpose`: all."""
        where = "tenant = ? AND expires_at > ?"
        values: list[str | float] = [tenant, now]
        if purpose:
            where += " AND purpose = ?"
            values.append(purpose)
        rows = self._page("files", where, values, tenant, after, limit, order)
        return [_FILE.decode(row) for row in rows[:limit]], len(rows) > limit

    def delete_file(self, tenant: str, file_id: str, now: float) -> None:
        """Raises TandemError `not_found`, or `invalid_request` while a batch reads it."""
        with self._db:
            self._db.execute("BEGIN IMMEDIATE")
            self.file(tenant, file_id, now)
            row = self._db.execute(
                f"SELECT id FROM batches WHERE input_file_id = ? AND {_UNFINISHED}", (file_id,)
            ).fetchone()
            if row is not None:
                raise TandemError(
                    "invalid_request",
                    f"the file is the input of {row[0]}, which has not ended; cancel it first",
                    param="file_id",
                )
            self._db.execute("DELETE FROM files WHERE id = ?", (file_id,))

    # Batches

    def add_batch(self, record: BatchRecord, now: float) -> None:
        """Raises TandemError `not_found` (its input) or `rate_limit_exceeded`."""
        with self._db:
            self._db.execute("BEGIN IMMEDIATE")
            file = self.file(record.tenant, record.input_file_id, now)
            if file.purpose != "batch":
                raise TandemError(
                    "invalid_request", "input_file_id must be a file with the purpose batch", param="input_file_id"
                )
            count = self._db.execute(
                f"SELECT COUNT(*) FROM batches WHERE tenant = ? AND {_UNFINISHED}", (record.tenant,)
            ).fetchone()[0]
            if count >= MAX_UNFINISHED:
                raise TandemError(
                    "rate_limit_exceeded",
                    f"{count} batches have not ended, of at most {MAX_UNFINISHED}; wait for one, or cancel one",
                    retry_after_s=60.0,
                )
            self._db.execute(
                "INSERT INTO batches (id, tenant, status, input_file_id, record) VALUES (?, ?, ?, ?, ?)",
                (record.id, record.tenant, record.status, record.input_file_id, msgspec.json.encode(record)),
            )

    def batch(self, tenant: str, batch_id: str) -> BatchRecord:
        """Raises TandemError `not_found`, also for another tenant's."""
        row = self._db.execute("SELECT record FROM batches WHERE id = ? AND tenant = ?", (batch_id, tenant)).fetchone()
        if row is None:
            raise TandemError("not_found", f"There is no batch `{batch_id[:64]}`.", param="batch_id")
        return _BATCH.decode(row[0])

    def batches(self, tenant: str, *, after: str, limit: int) -> tuple[list[BatchRecord], bool]:
        """The newest first; at most `limit`, and whether there are more."""
        rows = self._page("batches", "tenant = ?", [tenant], tenant, after, limit, "desc")
        return [_BATCH.decode(row) for row in rows[:limit]], len(rows) > limit

    def unfinished(self) -> list[BatchRecord]:
        """Batches of all tenants that have not ended, the oldest first."""
        rows = self._db.execute(f"SELECT record FROM batches WHERE {_UNFINISHED} ORDER BY seq").fetchall()
        return [_BATCH.decode(row[0]) for row in rows]

    def update(
        self,
        batch_id: str,
        change: Callable[[BatchRecord], BatchRecord],
        outputs: Sequence[FileRecord] = (),
    ) -> BatchRecord:
        """`change` sees the stored record, whoever wrote it last; `outputs` appear together with the change. Where it
        ends one batch too many, the tenant's oldest are forgotten."""
        with self._db:
            self._db.execute("BEGIN IMMEDIATE")
            row = self._db.execute("SELECT record FROM batches WHERE id = ?", (batch_id,)).fetchone()
            record = change(_BATCH.decode(row[0]))
            self._db.execute(
                "UPDATE batches SET status = ?, record = ? WHERE id = ?",
                (record.status, msgspec.json.encode(record), batch_id),
            )
            for file in outputs:
                self._insert_file(file)
            if not record.unfinished:
                self._forget_oldest(record.tenant)
        return record

    def cancel(self, tenant: str, batch_id: str, now: float) -> BatchRecord:
        """Whoever runs it will end it. Nothing happens to one that has ended. Raises TandemError `not_found`."""
        self.batch(tenant, batch_id)

        def change(record: BatchRecord) -> BatchRecord:
            if record.status not in ("validating", "in_progress"):
                return record
            return replace(record, status="cancelling", cancelling_at=int(now))

        return self.update(batch_id, change)

    # Expiry

    def drop_expired(self, now: float, batches_before: float) -> list[str]:
        """Ids of files that are gone now. The input of an unfinished batch stays."""
        with self._db:
            self._db.execute("BEGIN IMMEDIATE")
            rows = self._db.execute(
                "SELECT id FROM files WHERE expires_at <= ? AND id NOT IN "
                f"(SELECT input_file_id FROM batches WHERE {_UNFINISHED})",
                (now,),
            ).fetchall()
            self._db.executemany("DELETE FROM files WHERE id = ?", rows)
            ended = [
                (record.id,)
                for record in map(
                    _BATCH.decode, _column(self._db.execute(f"SELECT record FROM batches WHERE NOT {_UNFINISHED}"))
                )
                if (record.ended_at or record.created_at) <= batches_before
            ]
            self._db.executemany("DELETE FROM batches WHERE id = ?", ended)
        return [row[0] for row in rows]

    def _forget_oldest(self, tenant: str) -> None:
        """Keeps the bounds on a tenant's ended batches. Their files stay until they expire or are deleted."""
        ended = f"FROM batches WHERE tenant = ? AND NOT {_UNFINISHED}"
        count, size = self._db.execute(
            f"SELECT COUNT(*), COALESCE(SUM(LENGTH(record)), 0) {ended}", (tenant,)
        ).fetchone()
        if count <= MAX_ENDED and size <= MAX_ENDED_BYTES:
            return
        self._db.execute(
            "DELETE FROM batches WHERE seq IN (SELECT seq FROM (SELECT seq, ROW_NUMBER() OVER latest AS place, "
            f"SUM(LENGTH(record)) OVER latest AS size {ended} WINDOW latest AS (ORDER BY "
            "json_extract(CAST(record AS TEXT), '$.ended_at') DESC, seq DESC)) WHERE place > ? OR size > ?)",
            (tenant, MAX_ENDED, MAX_ENDED_BYTES),
        )

    def known_names(self) -> set[str]:
        """Names of all files on disk that belong to somebody."""
        names: set[str] = {row[0] for row in self._db.execute("SELECT id FROM files")}
        for record in self.unfinished():
            names |= {record.input_file_id, record.output_name, record.error_name}
        return names

    def _insert_file(self, record: FileRecord) -> None:
        self._db.execute(
            "INSERT INTO files (id, tenant, purpose, bytes, expires_at, record) VALUES (?, ?, ?, ?, ?, ?)",
            (record.id, record.tenant, record.purpose, record.bytes, record.expires_at, msgspec.json.encode(record)),
        )

    def _page(
        self, table: str, where: str, values: Sequence[str | float], tenant: str, after: str, limit: int, order: Order
    ) -> list[bytes]:
        """Records, one more than `limit` where there are more. Raises TandemError on an unknown `after`."""
        if after:
            row = self._db.execute(f"SELECT seq FROM {table} WHERE id = ? AND tenant = ?", (after, tenant)).fetchone()
            if row is None:
                raise TandemError("invalid_request", f"after: there is no `{after[:64]}`", param="after")
            where, values = f"{where} AND seq {'>' if order == 'asc' else '<'} ?", [*values, row[0]]
        return list(
            _column(
                self._db.execute(
                    f"SELECT record FROM {table} WHERE {where} ORDER BY seq {order.upper()} LIMIT ?",
                    (*values, limit + 1),
                )
            )
        )


def _column(rows: Iterable[tuple[bytes]]) -> Iterable[bytes]:
    return (row[0] for row in rows)
