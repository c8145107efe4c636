"""Folders of a process: private, gone with it, and after a kill with the next one; nothing else is ever removed."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from tandem.common import scratch
from tandem.common.caretaker import RUN_FOLDER_VARIABLE
from tandem.common.errors import ConfigError
from tandem.common.scratch import remove_abandoned, scratch_folder

HOLDS = """
import sys, time
from pathlib import Path
from tandem.common import scratch
scratch.scratch_roots = lambda: [Path(sys.argv[1])]
with scratch.scratch_folder() as folder:
    (folder / "deep").mkdir()
    (folder / "deep" / "file").touch()
    print(folder, flush=True)
    time.sleep(600)
"""


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    with tempfile.TemporaryDirectory(prefix="t-") as folder:  # pytest's is longer than a socket's path may be
        tmp_path = Path(folder)
        monkeypatch.setattr(scratch, "scratch_roots", lambda: [tmp_path])
        monkeypatch.delenv(RUN_FOLDER_VARIABLE, raising=False)
        yield tmp_path


def test_a_folder_is_private_whatever_the_umask_and_goes_at_the_end(root: Path) -> None:
    before = os.umask(0)
    try:
        with scratch_folder() as folder:
            assert folder.parent == root
            assert folder.stat().st_mode & 0o777 == 0o700
            assert not [path for path in folder.iterdir() if path.stat().st_mode & 0o077]
    finally:
        os.umask(before)
    assert list(root.iterdir()) == []


def test_a_supervisor_s_children_use_its_folder(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with scratch_folder() as run:
        monkeypatch.setenv(RUN_FOLDER_VARIABLE, str(run))
        with scratch_folder() as own:
            assert own.parent == run


def test_what_a_kill_left_goes_with_the_next_start_and_what_is_in_use_stays(root: Path) -> None:
    processes = [
        subprocess.Popen([sys.executable, "-c", HOLDS, str(root)], stdout=subprocess.PIPE, text=True) for _ in range(2)
    ]
    try:
        folders = []
        for process in processes:
            assert process.stdout is not None
            folders.append(Path(process.stdout.readline().strip()))
        processes[0].send_signal(signal.SIGKILL)
        processes[0].wait()
        assert all(folder.exists() for folder in folders)
        remove_abandoned()
        assert [folder.exists() for folder in folders] == [False, True]
    finally:
        for process in processes:
            process.kill()
            process.wait()


def test_only_what_is_ours_and_abandoned_is_removed(root: Path) -> None:
    precious = root / "precious"
    precious.mkdir(mode=0o700)
    (precious / "owner.lock").touch()
    (root / "tandem-link").symlink_to(precious)
    without_lock = root / "tandem-notes"
    without_lock.mkdir(mode=0o700)
    (without_lock / "file").touch()
    open_to_others = root / "tandem-shared"
    open_to_others.mkdir()
    open_to_others.chmod(0o770)
    (open_to_others / "owner.lock").touch()
    lock_is_link = root / "tandem-trap"
    lock_is_link.mkdir(mode=0o700)
    (lock_is_link / "owner.lock").symlink_to(precious / "owner.lock")
    lock_is_pipe = root / "tandem-pipe"
    lock_is_pipe.mkdir(mode=0o700)
    os.mkfifo(lock_is_pipe / "owner.lock")
    (root / "tandem-file").touch()
    abandoned = root / "tandem-old"
    abandoned.mkdir(mode=0o700)
    (abandoned / "owner.lock").touch()
    (abandoned / "out").symlink_to(precious)
    before = set(root.rglob("*"))
    remove_abandoned()
    assert before - set(root.rglob("*")) == {abandoned, abandoned / "owner.lock", abandoned / "out"}


@pytest.mark.parametrize("folder", ["missing", "file"])
def test_a_folder_that_cannot_be_written_is_named_with_the_remedy(
    folder: str, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (root / "file").touch()
    monkeypatch.setattr(scratch, "scratch_roots", lambda: [root / folder])
    with pytest.raises(ConfigError, match=rf"{root / folder}: nothing can be written there \(.+\); set TMPDIR to"):
        scratch_folder().__enter__()
    monkeypatch.setenv(RUN_FOLDER_VARIABLE, str(root / folder))
    with pytest.raises(ConfigError, match=f"{root / folder}: nothing can be written there"):
        scratch_folder().__enter__()


def test_no_folder_at_all_is_an_error_with_the_remedy(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> list[Path]:
        raise FileNotFoundError(errno.ENOENT, "No usable temporary directory found in ['/tmp']")

    monkeypatch.setattr(scratch, "scratch_roots", none)
    with pytest.raises(ConfigError, match=r"No usable .+; set TMPDIR to a folder"):
        scratch_folder().__enter__()
