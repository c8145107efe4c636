"""A small protocol for tests of the wire."""

from __future__ import annotations

import enum
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

from msgspec import Meta

from tandem.wire.link import Link, Patience
from tandem.wire.protocol import Body, Protocol, Reason

MAX_BODY, MAX_LONG, MAX_PAYLOAD = 16 << 10, 64 << 10, 1 << 30
VERSION = 7


class Note(Body, frozen=True):
    text: str
    number: Annotated[int, Meta(ge=0)] = 0


class Kind(enum.IntEnum):
    HELLO = 1
    REFUSE = 2
    NOTE = 10
    LONG = 11
    BYTES = 12
    END = 13
    PING = 14


BODIES: dict[Kind, type[Body]] = {Kind.NOTE: Note, Kind.LONG: Note, Kind.END: Reason}


def notes(version: int = VERSION, name: str = "notes") -> Protocol:
    return Protocol(
        name,
        b"NOTE" if name == "notes" else b"ELSE",
        version,
        Kind,
        BODIES,
        max_body_bytes=MAX_BODY,
        larger_bodies={Kind.LONG: MAX_LONG},
        max_payload_bytes={Kind.BYTES: MAX_PAYLOAD},
    )


NOTES = notes()
PATIENCE = Patience(connect_s=30.0, stall_s=30.0)


@contextmanager
def linked(patience: Patience = PATIENCE, other: Patience = PATIENCE) -> Iterator[tuple[Link, Link]]:
    """Two ends of one connection after their handshake; the first has `patience`."""
    left, right = socket.socketpair()
    links = Link(left, NOTES, patience), Link(right, NOTES, other)
    for link in links:
        link.handshake_is_over()
    try:
        yield links
    finally:
        for link in links:
            link.close()
