"""From a socket to a channel: the proof of the secret where there is one, Hello both ways, and the choice between
shared memory and the byte stream."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass

from tandem.handover.arena import ArenaReceiver, ArenaSender
from tandem.handover.frames import (
    Frame,
    FrameError,
    Hello,
    Kind,
    VersionMismatch,
    checksum,
    decode,
    decode_reason,
    encode,
    encode_reason,
)
from tandem.handover.inline import InlineReceiver, InlineSender
from tandem.handover.interfaces import Reason, TransportSettings
from tandem.handover.link import Link, PeerClosed
from tandem.handover.payload import PayloadReceiver, PayloadSender
from tandem.wire.challenge import demand, prove
from tandem.wire.peers import Endpoint, PeerIdentity, is_local

_KEEPALIVE_IDLE_S = 5
_KEEPALIVE_PROBES = 3


class HandshakeRefused(Exception):
    """The peers do not fit together, or the server has no room."""

    def __init__(self, reason: Reason) -> None:
        super().__init__(str(reason))
        self.reason = reason


@dataclass(frozen=True, slots=True)
class SendChannel:
    link: Link
    payload: PayloadSender
    lease_s: float
    """The receiver's."""

    def close(self) -> None:
        self.link.close()
        self.payload.close()


@dataclass(frozen=True, slots=True)
class ReceiveChannel:
    link: Link
    payload: PayloadReceiver
    peer: Hello

    def close(self) -> None:
        self.link.close()
        self.payload.close()


def connect(endpoint: Endpoint, identity: PeerIdentity, settings: TransportSettings) -> SendChannel:
    """Tries the unix socket on the same host, then TCP. Raises HandshakeRefused when the endpoint's worker refuses,
    ConnectionError when no address leads to that worker."""
    failures: list[str] = []
    if is_local(endpoint):
        try:
            return _connect_unix(endpoint, identity, settings)
        except (OSError, FrameError) as error:
            failures.append(f"{endpoint.unix_path}: {error}")
    if endpoint.host and endpoint.port:
        try:
            return _connect_tcp(endpoint, identity, settings)
        except (OSError, FrameError) as error:
            failures.append(f"{endpoint.host}:{endpoint.port}: {error}")
    raise ConnectionError("; ".join(failures) or f"no address of {endpoint.worker_id!r} is usable from this host")


def _connect_unix(endpoint: Endpoint, identity: PeerIdentity, settings: TransportSettings) -> SendChannel:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.settimeout(settings.connect_timeout_s)
        sock.connect(endpoint.unix_path)
        sender = (
            ArenaSender(settings.arena_bytes) if hasattr(os, "memfd_create") else InlineSender(settings.frame_bytes)
        )
        try:
            return _greet(sock, sender, endpoint, identity, settings)
        except BaseException:
            sender.close()
            raise
    except BaseException:
        sock.close()
        raise


def _connect_tcp(endpoint: Endpoint, identity: PeerIdentity, settings: TransportSettings) -> SendChannel:
    sock = socket.create_connection((endpoint.host, endpoint.port), settings.connect_timeout_s)
    try:
        tune_tcp(sock, settings)
        return _greet(sock, InlineSender(settings.frame_bytes), endpoint, identity, settings)
    except BaseException:
        sock.close()
        raise


def tune_tcp(sock: socket.socket, settings: TransportSettings) -> None:
    """No delay for small frames; a host that vanished is noticed on an idle connection, too."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    options = {
        "TCP_KEEPIDLE": _KEEPALIVE_IDLE_S,
        "TCP_KEEPINTVL": 1,
        "TCP_KEEPCNT": _KEEPALIVE_PROBES,
        "TCP_USER_TIMEOUT": int(settings.stall_timeout_s * 1000),
    }
    for name, value in options.items():
        if hasattr(socket, name):
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def _greet(
    sock: socket.socket,
    payload: ArenaSender | InlineSender,
    endpoint: Endpoint,
    identity: PeerIdentity,
    settings: TransportSettings,
) -> SendChannel:
    if identity.key:
        prove(sock, identity.key, settings.connect_timeout_s)
    link = Link(sock, settings.connect_timeout_s)
    hello = Hello(identity.worker_id, identity.epoch, identity.compatibility, settings.lease_s)
    if isinstance(payload, ArenaSender):
        hello = Hello(hello.worker_id, hello.epoch, hello.compatibility, hello.lease_s, settings.arena_bytes)
        body = encode(hello)
        frame = Frame(Kind.HELLO, length=len(body), checksum=checksum(body))
        link.send_with_descriptor(frame, body, payload.fd)
        payload.handed_over()
    else:
        link.send_body(Kind.HELLO, encode(hello))
    try:
        answer = link.receive()
    except VersionMismatch as error:
        raise HandshakeRefused(Reason("incompatible", str(error), retriable=False)) from error
    except ConnectionError as error:
        if identity.key:
            raise
        raise PeerClosed(f"{error}; it may ask for a secret, and this process has none") from error
    body_in = link.read_body(answer)
    if answer.kind is Kind.REFUSE and answer.stream == 0:
        raise HandshakeRefused(decode_reason(body_in))
    if answer.kind is not Kind.HELLO:
        raise FrameError(f"{answer.kind.name} instead of a Hello")
    theirs = decode(body_in, Hello)
    if (theirs.worker_id, theirs.epoch) != (endpoint.worker_id, endpoint.worker_epoch):
        raise ConnectionError(
            f"worker {theirs.worker_id!r} epoch {theirs.epoch} answers, not {endpoint.worker_id!r} epoch "
            f"{endpoint.worker_epoch}"
        )
    if theirs.compatibility != identity.compatibility:
        raise HandshakeRefused(_incompatible(identity, theirs))
    link.set_stall_timeout(settings.stall_timeout_s)
    return SendChannel(link, payload, theirs.lease_s)


def welcome(link: Link, identity: PeerIdentity, settings: TransportSettings) -> ReceiveChannel:
    """The server's half. Raises HandshakeRefused after telling the client, OSError, FrameError. Leaves closing `link`
    to the caller."""
    if identity.key:
        demand(link.sock, identity.key, settings.connect_timeout_s)
    try:
        frame, descriptor = _receive_first(link)
    except VersionMismatch as error:
        raise refuse(link, Reason("incompatible", str(error), retriable=False)) from error
    payload: PayloadReceiver | None = None
    try:
        if frame.kind is not Kind.HELLO:
            raise FrameError(f"{frame.kind.name} instead of a Hello")
        theirs = decode(link.read_body(frame), Hello)
        if theirs.compatibility != identity.compatibility:
            raise refuse(link, _incompatible(identity, theirs))
        if theirs.arena_bytes:
            if descriptor is None:
                raise FrameError("an arena was announced, and no descriptor came with the Hello")
            owned, descriptor = descriptor, None
            payload = ArenaReceiver(owned, theirs.arena_bytes)
        else:
            payload = InlineReceiver()
        link.send_body(
            Kind.HELLO, encode(Hello(identity.worker_id, identity.epoch, identity.compatibility, settings.lease_s))
        )
        link.set_stall_timeout(settings.stall_timeout_s)
        return ReceiveChannel(link, payload, theirs)
    except BaseException:
        if payload is not None:
            payload.close()
        raise
    finally:
        if descriptor is not None:
            os.close(descriptor)


def refuse(link: Link, reason: Reason) -> HandshakeRefused:
    """Tells the client; returns the exception to raise."""
    link.send_body(Kind.REFUSE, encode_reason(reason))
    return HandshakeRefused(reason)


def _receive_first(link: Link) -> tuple[Frame, int | None]:
    if link.sock.family == socket.AF_UNIX:
        return link.receive_with_descriptor()
    return link.receive(), None


def _incompatible(mine: PeerIdentity, theirs: Hello) -> Reason:
    return Reason(
        "incompatible",
        f"compatibility digest {mine.compatibility.hex()} on {mine.worker_id!r}, {theirs.compatibility.hex()} on "
        f"{theirs.worker_id!r}: the two do not serve the same model, dtype, layout and version",
        retriable=False,
    )
