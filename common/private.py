"""Folders and files with tenants' data: for this user alone, whatever the umask says and whatever they were before."""

from __future__ import annotations

import logging
import os
import stat
from pathlib import Path

log = logging.getLogger(__name__)

_OTHERS = stat.S_IRWXG | stat.S_IRWXO


def private_folder(path: Path) -> None:
    """Makes it, or closes the one that is there to others. Raises OSError."""
    path.mkdir(mode=stat.S_IRWXU, parents=True, exist_ok=True)
    _close_to_others(path)


def private_file(path: Path) -> None:
    """The same for a file, for libraries that open it themselves. Raises OSError."""
    os.close(private_opener(path, os.O_RDWR | os.O_CREAT))
    _close_to_others(path)


def private_opener(path: str | Path, flags: int) -> int:
    """An `opener` for `open`: the file that it makes is private. Raises OSError."""
    return os.open(path, flags | os.O_CLOEXEC, stat.S_IRUSR | stat.S_IWUSR)


def _close_to_others(path: Path) -> None:
    mode = stat.S_IMODE(path.stat().st_mode)
    if not mode & _OTHERS:
        return
    try:
        path.chmod(mode & ~_OTHERS)
        log.info("%s was open to other users; it is not any more", path)
    except PermissionError:
        log.warning("%s is open to other users and belongs to one of them: close it, it holds tenants' data", path)
