"""The handshake: that both know the secret, where there is one, and who is there.

client                                     server
(wire/challenge.py, where there is a secret)
Hello {name}                        ->
                                    <-     Welcome {node id, epoch, host id, arena size} + descriptor, or Refuse
"""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass

from tandem.common.secret import derive
from tandem.kvstore.dataplane.link import CONNECT_S, Link, expect
from tandem.kvstore.dataplane.protocol import (
    Body,
    Hello,
    Kind,
    ProtocolError,
    Refuse,
    VersionMismatch,
    Welcome,
)
from tandem.wire.challenge import Unproven, demand, prove


class HandshakeRefused(Exception):
    """The two must not talk to each other: another secret, another version, no room."""


@dataclass(frozen=True, slots=True)
class ServerIdentity:
    node_id: str
    epoch: int
    host_id: str


@dataclass(frozen=True, slots=True)
class Greeting:
    """What a client knows after the handshake."""

    server: ServerIdentity
    arena_bytes: int
    descriptor: int | None
    """Of the arena, owned by the caller. None over TCP."""


def data_plane_key(secret: bytes) -> bytes:
    """Empty without a secret."""
    return derive(secret, "data plane") if secret else b""


def greet(link: Link, name: str, key: bytes) -> Greeting:
    """The client's half. `key` is of `data_plane_key`. Raises HandshakeRefused, ProtocolError, OSError. Leaves closing
    `link` to the caller."""
    try:
        if key:
            prove(link.sock, key, CONNECT_S)
        with contextlib.suppress(BrokenPipeError):  # turned away already: the reason can still be read
            link.send(Kind.HELLO, 0, Hello(name))
        descriptor: int | None = None
        if link.is_unix:
            _, answer, descriptor = link.receive_with_descriptor(CONNECT_S)
        else:
            _, answer = link.receive(CONNECT_S)
    except VersionMismatch as error:
        raise HandshakeRefused(str(error)) from error
    except Unproven as error:
        raise HandshakeRefused(str(error)) from error
    except ConnectionError as error:
        if key:
            raise
        raise HandshakeRefused(f"it hung up ({error}): it may ask for a secret, and this process has none") from error
    try:
        welcome = expect(_accepted(answer), Welcome)
        if welcome.arena_bytes and descriptor is None:
            raise ProtocolError("an arena was announced, and no descriptor came with the Welcome")
    except BaseException:
        if descriptor is not None:
            os.close(descriptor)
        raise
    return Greeting(ServerIdentity(welcome.node_id, welcome.epoch, welcome.host_id), welcome.arena_bytes, descriptor)


def _accepted(body: Body) -> Body:
    if isinstance(body, Refuse):
        raise HandshakeRefused(f"{body.code}: {body.message}")
    return body


def admit(link: Link, key: bytes) -> str:
    """The server's half up to the client's name; `welcome` or `refuse` comes next. Raises HandshakeRefused,
    ProtocolError, OSError. Who does not know the secret is told nothing."""
    if key:
        try:
            demand(link.sock, key, CONNECT_S)
        except (Unproven, TimeoutError) as error:
            raise HandshakeRefused(str(error)) from error
    try:
        return expect(link.receive(CONNECT_S)[1], Hello).name
    except VersionMismatch as error:
        raise refuse(link, "version", str(error)) from error


def welcome(link: Link, me: ServerIdentity, arena_bytes: int, descriptor: int | None) -> None:
    if descriptor is None or not link.is_unix:
        link.send(Kind.WELCOME, 0, Welcome(me.node_id, me.epoch, me.host_id, 0))
    else:
        body = Welcome(me.node_id, me.epoch, me.host_id, arena_bytes)
        link.send_with_descriptor(Kind.WELCOME, 0, body, descriptor)


def refuse(link: Link, code: str, message: str) -> HandshakeRefused:
    """Tells the client; returns the exception to raise."""
    link.send(Kind.REFUSE, 0, Refuse(code, message))
    return HandshakeRefused(f"{code}: {message}")
