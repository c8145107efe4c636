"""The handshake: who is there, and that both know the secret where one is set.

    client                                     server
    Hello {name, nonce}                 ->
                                        <-     Challenge {node id, epoch, host id, nonce, proof}
    Proof {proof}                       ->
                                        <-     Welcome {arena size} + descriptor, or Refuse

A proof is HMAC-SHA256 over the role, both nonces and the names: a recorded one is of no use, and neither side's proof
can be sent back as the other's. The secret keeps strangers out; it does not encrypt. Run TCP inside a trusted network.
"""

from __future__ import annotations

import contextlib
import hmac
import os
from dataclasses import dataclass
from pathlib import Path

import msgspec

from tandem.common.errors import ConfigError
from tandem.kvstore.dataplane.link import CONNECT_S, Link, expect
from tandem.kvstore.dataplane.protocol import (
    Body,
    Challenge,
    Hello,
    Kind,
    Proof,
    ProtocolError,
    Refuse,
    VersionMismatch,
    Welcome,
)

MIN_SECRET_BYTES = 16
_NONCE_BYTES = 32


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


def read_secret(path: str) -> bytes:
    """The shared secret in `path`, without white space around it; empty for an empty path. Raises ConfigError."""
    if not path:
        return b""
    try:
        secret = Path(path).read_bytes().strip()
    except OSError as error:
        raise ConfigError(f"kv_secret_file {path}: cannot be read ({error.strerror})") from error
    if len(secret) < MIN_SECRET_BYTES:
        raise ConfigError(
            f"kv_secret_file {path}: {len(secret)} bytes are too few, write at least {MIN_SECRET_BYTES} into it "
            "(`openssl rand -hex 32`)"
        )
    return secret


def greet(link: Link, name: str, secret: bytes) -> Greeting:
    """The client's half. Raises HandshakeRefused, ProtocolError, OSError. Leaves closing `link` to the caller."""
    hello = Hello(name, os.urandom(_NONCE_BYTES))
    with contextlib.suppress(BrokenPipeError):  # turned away already: the reason can still be read
        link.send(Kind.HELLO, 0, hello)
    try:
        challenge = expect(_accepted(link.receive(CONNECT_S)[1]), Challenge)
    except VersionMismatch as error:
        raise HandshakeRefused(str(error)) from error
    if secret and not hmac.compare_digest(challenge.proof, _proof(secret, b"server", hello, challenge)):
        raise HandshakeRefused(
            f"node {challenge.node_id!r} {'has another secret' if challenge.proof else 'has no secret'}: "
            "give both the same kv_secret_file"
        )
    link.send(Kind.PROOF, 0, Proof(_proof(secret, b"client", hello, challenge)))
    descriptor: int | None = None
    if link.is_unix:
        _, answer, descriptor = link.receive_with_descriptor(CONNECT_S)
    else:
        _, answer = link.receive(CONNECT_S)
    try:
        welcome = expect(_accepted(answer), Welcome)
        if welcome.arena_bytes and descriptor is None:
            raise ProtocolError("an arena was announced, and no descriptor came with the Welcome")
    except BaseException:
        if descriptor is not None:
            os.close(descriptor)
        raise
    server = ServerIdentity(challenge.node_id, challenge.epoch, challenge.host_id)
    return Greeting(server, welcome.arena_bytes, descriptor)


def _accepted(body: Body) -> Body:
    if isinstance(body, Refuse):
        raise HandshakeRefused(f"{body.code}: {body.message}")
    return body


def admit(link: Link, me: ServerIdentity, secret: bytes) -> str:
    """The server's half up to the proof; `welcome` or `refuse` comes next. Returns the client's name. Raises
    HandshakeRefused after telling the client, ProtocolError, OSError."""
    try:
        hello = expect(link.receive(CONNECT_S)[1], Hello)
    except VersionMismatch as error:
        raise refuse(link, "version", str(error)) from error
    unproven = Challenge(me.node_id, me.epoch, me.host_id, os.urandom(_NONCE_BYTES), b"")
    challenge = msgspec.structs.replace(unproven, proof=_proof(secret, b"server", hello, unproven))
    link.send(Kind.CHALLENGE, 0, challenge)
    proof = expect(link.receive(CONNECT_S)[1], Proof)
    if not hmac.compare_digest(proof.proof, _proof(secret, b"client", hello, challenge)):
        wrong = (
            "another secret" if secret and proof.proof else "no secret" if secret else "a secret, this node has none"
        )
        raise refuse(link, "unauthenticated", f"the client has {wrong}: give both the same kv_secret_file")
    return hello.name


def welcome(link: Link, arena_bytes: int, descriptor: int | None) -> None:
    if descriptor is None or not link.is_unix:
        link.send(Kind.WELCOME, 0, Welcome(0))
    else:
        link.send_with_descriptor(Kind.WELCOME, 0, Welcome(arena_bytes), descriptor)


def refuse(link: Link, code: str, message: str) -> HandshakeRefused:
    """Tells the client; returns the exception to raise."""
    link.send(Kind.REFUSE, 0, Refuse(code, message))
    return HandshakeRefused(f"{code}: {message}")


def _proof(secret: bytes, role: bytes, hello: Hello, challenge: Challenge) -> bytes:
    if not secret:
        return b""
    names = (role, hello.name, hello.nonce, challenge.node_id, challenge.epoch, challenge.host_id, challenge.nonce)
    return hmac.digest(secret, msgspec.msgpack.encode(names), "sha256")
