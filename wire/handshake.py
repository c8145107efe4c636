"""From a socket to two ends that know each other.

    client                                        server
    (challenge.py, where there is a secret)
    Hello {name, epoch, compatibility ...}   ->
                                             <-   Hello, or Refuse {reason}

Either Hello may come with shared memory on a unix socket. Refused are another version, and another digest of what both
ends must share; both ends then name the two.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from tandem.wire.challenge import Unproven, demand, prove
from tandem.wire.header import ProtocolError, VersionMismatch
from tandem.wire.link import Link, LinkClosed, Patience, connect_tcp, connect_unix
from tandem.wire.peers import PeerIdentity, Place, is_local
from tandem.wire.protocol import Body, Hello, Protocol, Reason, expect
from tandem.wire.shared_memory import SharedMemory

_T = TypeVar("_T")


class HandshakeRefused(Exception):
    """The two must not talk to each other, or the server has no room."""

    def __init__(self, reason: Reason) -> None:
        super().__init__(str(reason))
        self.reason = reason


@dataclass(frozen=True, slots=True)
class Greeting:
    """What one end knows after the other's Hello."""

    peer: Hello
    memory: SharedMemory | None
    """The caller's. None: the peer shares none."""

    def drop_memory(self) -> None:
        if self.memory is not None:
            self.memory.close()


def connect(place: Place, protocol: Protocol, patience: Patience, greet: Callable[[Link], _T]) -> _T:
    """Connects to `place` (its unix socket on the same host, then TCP) and gives what `greet` makes of the link. A link
    on which `greet` fails is closed. Raises HandshakeRefused when an address refuses and none leads to who is meant,
    else ConnectionError."""
    attempts: list[tuple[str, Callable[[], Link]]] = []
    if is_local(place):
        attempts.append((place.unix_path, lambda: connect_unix(place.unix_path, protocol, patience)))
    if place.host and place.port:
        attempts.append((f"{place.host}:{place.port}", lambda: connect_tcp(place.host, place.port, protocol, patience)))
    failures: list[str] = []
    refusal: HandshakeRefused | None = None
    for address, attempt in attempts:
        try:
            return _greeted(attempt(), greet)
        except HandshakeRefused as error:
            refusal = error
        except (OSError, ProtocolError) as error:
            failures.append(f"{address}: {error}")
    if refusal is not None:
        raise refusal
    raise ConnectionError("; ".join(failures) or "none of its addresses can be used from this host")


def _greeted(link: Link, greet: Callable[[Link], _T]) -> _T:
    try:
        return greet(link)
    except BaseException:
        link.close()
        raise


def greet(
    link: Link,
    me: PeerIdentity,
    *,
    expected: str | None = None,
    expected_epoch: int | None = None,
    memory: SharedMemory | None = None,
) -> Greeting:
    """The client's half; shares `memory` with the server, and leaves its descriptor to the caller. Raises
    HandshakeRefused, ProtocolError, OSError: ConnectionError when another one answers than `expected`. Leaves closing
    `link` to the caller."""
    if me.key:
        prove(link.sock, me.key, link.patience.connect_s)
    try:
        with contextlib.suppress(BrokenPipeError):  # turned away already: the reason can still be read
            _send_hello(link, me, 0.0, memory)
        greeting = _receive_hello(link)
    except VersionMismatch as error:
        raise HandshakeRefused(Reason("incompatible", str(error), retriable=False)) from error
    except ConnectionError as error:
        if me.key:
            raise
        raise LinkClosed(f"{error}; it may ask for a secret, and this process has none") from error
    try:
        _check_name(greeting.peer, expected, expected_epoch)
        _check_fit(greeting.peer, me)
    except BaseException:
        greeting.drop_memory()
        raise
    link.handshake_is_over()
    return greeting


def admit(link: Link, me: PeerIdentity) -> Greeting:
    """The server's half up to the client's Hello; `answer` or `refuse` comes next. Raises HandshakeRefused after
    telling the client, ProtocolError, OSError. Who does not know the secret is told nothing."""
    if me.key:
        try:
            demand(link.sock, me.key, link.patience.connect_s)
        except (Unproven, TimeoutError) as error:
            raise HandshakeRefused(Reason("unproven", str(error))) from error
    try:
        greeting = _receive_hello(link)
    except VersionMismatch as error:
        raise refuse(link, Reason("incompatible", str(error), retriable=False)) from error
    try:
        _check_fit(greeting.peer, me)
    except HandshakeRefused as error:
        greeting.drop_memory()
        raise refuse(link, error.reason) from error
    return greeting


def answer(link: Link, me: PeerIdentity, *, lease_s: float = 0.0, memory: SharedMemory | None = None) -> None:
    """The server's Hello. `memory` goes to clients on a unix socket only; its descriptor stays the caller's."""
    _send_hello(link, me, lease_s, memory if link.is_unix else None)
    link.handshake_is_over()


def refuse(link: Link, reason: Reason) -> HandshakeRefused:
    """Tells the client, without waiting for it; returns the exception to raise."""
    link.post(link.protocol.refuse, 0, reason)
    return HandshakeRefused(reason)


def _send_hello(link: Link, me: PeerIdentity, lease_s: float, memory: SharedMemory | None) -> None:
    hello = Hello(me.name, me.epoch, me.compatibility, lease_s, memory.size if memory else 0)
    if memory is None:
        link.send(link.protocol.hello, 0, hello)
    else:
        link.send_with_descriptor(link.protocol.hello, 0, hello, memory.descriptor)


def _receive_hello(link: Link) -> Greeting:
    _, body, descriptor = link.receive_first(link.patience.connect_s)
    try:
        hello = _hello(body)
        if not hello.arena_bytes:
            return Greeting(hello, None)
        if descriptor is None:
            raise ProtocolError("shared memory was announced, and no descriptor came with the Hello")
        memory, descriptor = SharedMemory(descriptor, hello.arena_bytes), None
        return Greeting(hello, memory)
    finally:
        if descriptor is not None:
            os.close(descriptor)


def _hello(body: Body) -> Hello:
    if isinstance(body, Reason):
        raise HandshakeRefused(body)
    return expect(body, Hello)


def _check_name(peer: Hello, expected: str | None, expected_epoch: int | None) -> None:
    epoch = peer.epoch if expected_epoch is None else expected_epoch
    if expected is not None and (peer.name, peer.epoch) != (expected, epoch):
        raise ConnectionError(f"{peer.name!r} epoch {peer.epoch} answers, not {expected!r} epoch {epoch}")


def _check_fit(peer: Hello, me: PeerIdentity) -> None:
    if peer.compatibility != me.compatibility:
        raise HandshakeRefused(
            Reason(
                "incompatible",
                f"compatibility digest {me.compatibility.hex()} on {me.name!r}, {peer.compatibility.hex()} on "
                f"{peer.name!r}: the two do not serve the same model, dtype, layout and version",
                retriable=False,
            )
        )
