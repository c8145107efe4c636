"""Private folders for what a process needs on disk while it lives: sockets, settings of children.

Where a supervisor runs, they lie in its run folder and go with it. A folder of its own has a file that its owner keeps
locked; the next process that makes one removes those whose owner is dead, as kill -9 leaves them, and ends what still
runs for them.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

from tandem.common.caretaker import RUN_FOLDER_VARIABLE, end_processes_of
from tandem.common.errors import ConfigError

PREFIX = "tandem-"
_LOCK = "owner.lock"
_LONGEST = 70
"""Length of a folder's path: a unix socket's path may have 107 bytes."""


def scratch_roots() -> list[Path]:
    """Where scratch folders may be; a long TMPDIR is not used."""
    return [Path(folder) for folder in dict.fromkeys((tempfile.gettempdir(), "/tmp"))]


@contextlib.contextmanager
def scratch_folder() -> Iterator[Path]:
    """A new folder with mode 0700, removed at the end of the `with`. Raises ConfigError."""
    within = os.environ.get(RUN_FOLDER_VARIABLE)
    folder, lock = _new_folder(within)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if lock >= 0:
            os.close(lock)


def _new_folder(within: str | None) -> tuple[Path, int]:
    """Makes it, and gives the descriptor of its lock; -1: it goes with `within`, which has one. Raises ConfigError."""
    root: str | Path = within or ""
    try:
        if within is not None:
            return Path(tempfile.mkdtemp(prefix=PREFIX, dir=within)), -1
        remove_abandoned()
        root = next(each for each in scratch_roots() if len(str(each)) <= _LONGEST)
        folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=root))
        try:
            return folder, _locked(folder)
        except OSError:
            shutil.rmtree(folder, ignore_errors=True)
            raise
    except OSError as error:
        where = f"{root}: nothing can be written there ({error.strerror})" if root else error.strerror or str(error)
        raise ConfigError(f"{where}; set TMPDIR to a folder that can be written") from error


def remove_abandoned() -> None:
    """Removes scratch folders of this user whose owner is dead, and nothing else: no link is followed, and a folder
    without the lock, or that others may write to, is let alone."""
    for root in scratch_roots():
        with contextlib.suppress(OSError):
            names = [entry.name for entry in os.scandir(root) if entry.name.startswith(PREFIX)]
            for name in names:
                with contextlib.suppress(OSError):
                    _remove_if_abandoned(root, name)


def _locked(folder: Path) -> int:
    """The descriptor that holds the lock. The file gets its name once it is locked, so that nobody finds it free."""
    unnamed = folder / f".{_LOCK}"
    descriptor = os.open(unnamed, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    unnamed.rename(folder / _LOCK)
    return descriptor


def _remove_if_abandoned(root: Path, name: str) -> None:
    """Raises OSError where it is in use, or none of ours."""
    folder = os.open(root / name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        found = os.fstat(folder)
        if found.st_uid != os.geteuid() or found.st_mode & 0o077:
            return
        lock = os.open(_LOCK, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=folder)
        try:
            if not stat.S_ISREG(os.fstat(lock).st_mode):
                return
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            end_processes_of(str(root / name))
            shutil.rmtree(root / name)
        finally:
            os.close(lock)
    finally:
        os.close(folder)
