"""Long lists of an answer, written a part at a time and never joined: an encoder holds the interpreter until it is
done, as does a copy of megabytes, and the objects of a million entries take a gigabyte."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice
from typing import Any

import msgspec

ENTRIES_AT_ONCE = 256
"""Fewer than what sets off Python's garbage collector, which would look at all that there is."""
_PLACE = b"\0"
"""Stands for a long list: JSON holds no such byte."""


class LongList:
    """A list that has been written."""

    __slots__ = ("parts",)

    def __init__(self, parts: list[bytes]) -> None:
        """`parts`: of its JSON, brackets included."""
        self.parts = parts


def encoded_list(values: Iterable[Any], at_once: int = ENTRIES_AT_ONCE) -> LongList:
    """`values` are made as they are needed, `at_once` of them at a time."""
    left = iter(values)
    parts = [b"["]
    while part := list(islice(left, at_once)):
        parts += [b","] if len(parts) > 1 else []
        parts.append(msgspec.json.encode(part)[1:-1])
    return LongList([*parts, b"]"])


def encoded_ids(token_ids: list[int]) -> list[int] | LongList:
    """The same of token ids, where there are many."""
    return token_ids if len(token_ids) <= 4096 else encoded_list(token_ids, 4096)


def encoded(value: Any) -> bytes:
    """JSON of what may hold long lists."""
    return b"".join(_parts(value))


def encoded_parts(content: dict[str, Any]) -> list[bytes]:
    """The parts of an object as JSON. Entries of its lists are parts of their own: joined, they would be copied."""
    parts = [b"{"]
    for name, value in content.items():
        parts.append(b"%b%b:" % (b"," if len(parts) > 1 else b"", msgspec.json.encode(name)))
        if isinstance(value, list):
            parts.append(b"[")
            for index, entry in enumerate(value):
                parts += [b","] if index else []
                parts += _parts(entry)
            parts.append(b"]")
        else:
            parts += _parts(value)
    return [*parts, b"}"]


def _parts(value: Any) -> list[bytes]:
    found: list[LongList] = []

    def place(part: Any) -> msgspec.Raw:
        """A placeholder for a long list, which is written later. Raises TypeError for other values."""
        if not isinstance(part, LongList):
            raise TypeError(f"{type(part).__name__} is not written as JSON")
        found.append(part)
        return msgspec.Raw(_PLACE)

    begin, *rest = msgspec.json.encode(value, enc_hook=place).split(_PLACE)
    parts = [begin]
    for part, end in zip(found, rest, strict=True):
        parts += [*part.parts, end]
    return parts
