"""Takes secrets out of this process's command line, which everybody on the machine can read (`ps`)."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Collection
from pathlib import Path

_PASSWORD = re.compile(rb"(?<=://)([^/@\s]*:)([^/@\s]+)(?=@)")
"""The password of a URL."""
_ARG_START, _ARG_END = 48 - 3, 49 - 3
"""Fields of /proc/PID/stat, counted from the one behind the name."""


def has_password(text: str) -> bool:
    return _PASSWORD.search(text.encode()) is not None


def hide_arguments(secrets: Collection[str]) -> None:
    """Overwrites each argument that is one of `secrets` or ends with `=SECRET`, and passwords in URLs, with as many
    stars. Only this process's memory of its command line changes; where that cannot be found (not Linux), nothing."""
    try:
        stat = Path("/proc/self/stat").read_text(encoding="ascii", errors="replace")
        fields = stat.rpartition(")")[2].split()
        start, end = int(fields[_ARG_START]), int(fields[_ARG_END])
        shown = Path("/proc/self/cmdline").read_bytes()
    except (OSError, ValueError, IndexError):
        return
    if not start or end - start != len(shown):
        return
    hidden = b"\0".join(_hidden(word, [secret.encode() for secret in secrets if secret]) for word in shown.split(b"\0"))
    if hidden != shown and len(hidden) == len(shown):
        ctypes.memmove(start, hidden, len(hidden))


def _hidden(word: bytes, secrets: Collection[bytes]) -> bytes:
    for secret in secrets:
        if word == secret or word.endswith(b"=" + secret):
            return word[: -len(secret)] + b"*" * len(secret)
    return _PASSWORD.sub(lambda match: match[1] + b"*" * len(match[2]), word)
