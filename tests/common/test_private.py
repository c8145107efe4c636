"""What holds tenants' data is private, whatever the umask, and whatever it was before."""

from __future__ import annotations

import os
import sqlite3
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from tandem.common.private import private_file, private_folder, private_opener


@pytest.fixture(params=[0o000, 0o022, 0o077])
def umask(request: pytest.FixtureRequest) -> Iterator[None]:
    before = os.umask(request.param)
    yield
    os.umask(before)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.usefixtures("umask")
def test_what_is_made_is_private(tmp_path: Path) -> None:
    private_folder(tmp_path / "a" / "b")
    private_file(tmp_path / "index")
    with open(tmp_path / "lines", "wb", opener=private_opener) as file:
        file.write(b"x")
    assert [mode(tmp_path / name) for name in ("a/b", "index", "lines")] == [0o700, 0o600, 0o600]
    index = sqlite3.connect(tmp_path / "index")
    index.execute("PRAGMA journal_mode = WAL")
    index.execute("CREATE TABLE t (x)")
    assert [mode(tmp_path / f"index{more}") for more in ("-wal", "-shm")] == [0o600, 0o600]
    index.close()


def test_what_is_there_is_closed_and_keeps_its_content(tmp_path: Path) -> None:
    folder, file = tmp_path / "folder", tmp_path / "file"
    folder.mkdir()
    folder.chmod(0o2775)
    file.write_text("kept")
    file.chmod(0o644)
    private_folder(folder)
    private_file(file)
    assert (mode(folder), mode(file), file.read_text()) == (0o2700, 0o600, "kept")
