"""The index of files and batches alone: what a tenant may leave behind in it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tandem.router.batch import store
from tandem.router.batch.records import BatchRecord, FileRecord
from tandem.router.batch.store import Index


@pytest.fixture
def index(tmp_path: Path) -> Index:
    index = Index(tmp_path / "index.sqlite")
    for tenant in ("a", "b"):
        index.add_file(FileRecord(f"file-{tenant}", tenant, "in.jsonl", "batch", 1, created_at=0, expires_at=1000))
    return index


def make(index: Index, name: str, tenant: str = "a", note: str = "") -> None:
    metadata = {"note": note} if note else {}
    index.add_batch(BatchRecord(name, tenant, "/v1/completions", f"file-{tenant}", 0, "", "", metadata=metadata), now=1)


def end(index: Index, name: str, at: int) -> None:
    index.update(name, lambda record: replace(record, status="completed", ended_at=at))


def names(index: Index, tenant: str = "a") -> set[str]:
    return {record.id for record in index.batches(tenant, after="", limit=1000)[0]}


def test_beyond_so_many_ended_batches_those_that_ended_first_are_forgotten(
    index: Index, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "MAX_ENDED", 2)
    for name in ("long", "first", "second", "waits"):
        make(index, name)
    make(index, "other", tenant="b")
    end(index, "other", at=1)
    end(index, "first", at=5)
    end(index, "second", at=6)
    assert names(index) == {"long", "first", "second", "waits"}
    end(index, "long", at=7)
    assert names(index) == {"long", "second", "waits"}
    assert names(index, "b") == {"other"}


def test_large_records_push_out_older_ones_of_the_same_tenant_only(
    index: Index, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "MAX_ENDED_BYTES", 3500)
    make(index, "other", tenant="b", note="x" * 2500)
    end(index, "other", at=1)
    for at, name in enumerate(("small", "large", "larger")):
        make(index, name, note="x" * 1000 * at)
        end(index, name, at)
    assert names(index) == {"larger"}
    make(index, "last")
    end(index, "last", at=9)
    assert names(index) == {"larger", "last"}
    assert names(index, "b") == {"other"}
