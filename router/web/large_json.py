"""Long lists of an answer, written a part at a time: an encoder holds the interpreter until it is done, and the objects
of a million entries take a gigabyte."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice
from typing import Any

import msgspec

ENTRIES_AT_ONCE = 256


def encoded_list(values: Iterable[Any], at_once: int = ENTRIES_AT_ONCE) -> msgspec.Raw:
    """As JSON. `values` are made as they are needed, `at_once` of them at a time."""
    left = iter(values)
    parts: list[bytes] = []
    while part := list(islice(left, at_once)):
        parts.append(msgspec.json.encode(part)[1:-1])
    return msgspec.Raw(b"[%b]" % b",".join(parts))


def encoded_ids(token_ids: list[int]) -> list[int] | msgspec.Raw:
    """The same of token ids, where there are many."""
    return token_ids if len(token_ids) <= 4096 else encoded_list(token_ids, 4096)


def encoded_parts(content: dict[str, Any]) -> list[bytes]:
    """The parts of an object as JSON. Entries of its lists are parts of their own: joined, they would be copied."""
    parts = [b"{"]
    for name, value in content.items():
        parts.append(b"%b%b:" % (b"," if len(parts) > 1 else b"", msgspec.json.encode(name)))
        if isinstance(value, list):
            parts.append(b"[")
            for index, entry in enumerate(value):
                parts += [b","] if index else []
                parts.append(msgspec.json.encode(entry))
            parts.append(b"]")
        else:
            parts.append(msgspec.json.encode(value))
    return [*parts, b"}"]
