"""Frames, handshake, and a server that is told nonsense."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tandem.kvstore.dataplane import protocol
from tandem.kvstore.dataplane.protocol import DATA_PLANE, Kind
from tandem.kvstore.interfaces import ObjectInfo, Refusal
from tandem.wire.handshake import HandshakeRefused, greet
from tandem.wire.header import Header, ProtocolError, checksum
from tandem.wire.link import Link, LinkClosed, Patience
from tandem.wire.peers import PeerIdentity
from tandem.wire.protocol import Body, Hello

from .conftest import DEADLINE_S, SECRET, Rig
from .scripted_node import key

Eventually = Callable[[Callable[[], object]], None]


@given(st.sampled_from(list(Kind)), st.binary(max_size=200))
def test_any_body_is_a_body_or_an_error(kind: Kind, raw: bytes) -> None:
    try:
        body = DATA_PLANE.decode(Header(kind, 1, len(raw), body_checksum=checksum(raw)), raw)
    except ProtocolError:
        return
    assert isinstance(body, Body)


@pytest.mark.parametrize(
    "header",
    [
        Header(Kind.READ, 1, protocol.MAX_BODY_BYTES + 1),
        Header(Kind.DATA, 1, 0, protocol.MAX_OBJECT_BYTES + 1),
        Header(Kind.ABORT, 1, 1),
        Header(Kind.COMMIT, 1, 2, 1),
    ],
)
def test_lengths_beyond_the_bounds_are_refused(header: Header) -> None:
    with pytest.raises(ProtocolError, match="limit"):
        DATA_PLANE.parse(DATA_PLANE.pack(header))


@pytest.mark.parametrize("connect", ["unix", "tcp"])
@pytest.mark.parametrize(
    ("server_secret", "client_secret", "complaint"),
    [
        (SECRET, b"", "this process has none"),
        (SECRET, b"another secret of 16 bytes", "another secret"),
        (b"", SECRET, "it may have no secret"),
    ],
)
def test_a_wrong_secret_is_refused_and_the_client_says_why(
    rig: Rig, connect: str, server_secret: bytes, client_secret: bytes, complaint: str
) -> None:
    rig.server.stop()
    rig.start(secret=server_secret)
    link = rig.connect(connect)
    with pytest.raises(ConnectionError, match=complaint):
        greet(link, PeerIdentity("me", key=DATA_PLANE.key(client_secret)))
    link.close()


def test_with_the_same_secret_it_works(rig: Rig) -> None:
    rig.server.stop()
    rig.start(secret=SECRET)
    home = rig.home(SECRET)
    rig.node.store(key(0), b"x")
    assert len(home.locate([key(0)])) == 1
    for transport in ("unix", "tcp"):
        assert rig.reader(transport, SECRET).read_many("n0", [(key(0), 0, memoryview(bytearray(1)))]) == [True]
        assert rig.reader(transport).read_many("n0", [(key(0), 0, memoryview(bytearray(1)))]) == [False]


def test_nothing_is_served_before_the_proof(rig: Rig) -> None:
    rig.server.stop()
    rig.start(secret=SECRET)
    rig.node.store(key(0), b"x")
    link = rig.connect("tcp")
    link.send(Kind.READ, 1, protocol.Read([protocol.Range(key(0), 0, 1)]))
    with pytest.raises(ConnectionError):
        link.receive(DEADLINE_S)
    link.close()


INFO = ObjectInfo(size=10, num_tokens=1)


@pytest.mark.parametrize(
    "send",
    [
        lambda link: link.sock.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n....................."),
        lambda link: link.send(Kind.HELLO, 1, Hello("x")),
        lambda link: link.send(Kind.PUSH, 1, protocol.Push(key(1), INFO), b"123"),
        lambda link: link.send(Kind.BEGIN_PUT, 1, protocol.BeginPut(key(1), INFO)),
        lambda link: link.sock.sendall(DATA_PLANE.pack(Header(Kind.READ, 1, 3, sequence=1)) + b"\xc1\xc1\xc1"),
    ],
)
def test_nonsense_ends_the_connection_and_nothing_else(
    rig: Rig, send: Callable[[Link], None], eventually: Eventually
) -> None:
    home = rig.home()
    link = rig.greeted("tcp")
    send(link)
    with pytest.raises(LinkClosed):
        link.receive(DEADLINE_S)
    link.close()
    eventually(lambda: rig.server.stats().malformed_frames == 1)
    assert home.begin_put(key(2), INFO) is not Refusal.CLOSED


def test_a_push_that_breaks_off_leaves_nothing(rig: Rig, eventually: Eventually) -> None:
    link = rig.greeted("tcp")
    link.sock.sendall(DATA_PLANE.frame(Kind.PUSH, 1, protocol.Push(key(1), INFO), 10, sequence=1) + b"12345")
    eventually(lambda: rig.node.tickets)
    link.close()
    eventually(lambda: rig.node.tickets[0].ending == "aborted")
    assert key(1) not in rig.node.objects


def test_leases_end_with_the_connection(rig: Rig, eventually: Eventually) -> None:
    rig.node.store(key(0), b"x" * 10)
    link = rig.greeted("unix")
    link.send(Kind.LEASE, 1, protocol.Lease([protocol.Range(key(0), 0, 10)]))
    _, body = link.receive(DEADLINE_S)
    assert isinstance(body, protocol.Leased)
    assert body.offsets[0] == rig.node.objects[key(0)][1]
    assert rig.node.views == 1
    link.close()
    eventually(lambda: rig.node.views == 0)


def test_a_reader_that_takes_nothing_is_dropped(
    rig: Rig, eventually: Eventually, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tandem.kvstore.dataplane.server.PATIENCE", Patience(stall_s=0.3))
    rig.server.stop()
    rig.start()
    rig.node.store(key(0), bytes(32 << 20))
    link = rig.greeted("tcp")
    link.send(Kind.READ, 1, protocol.Read([protocol.Range(key(0), 0, 32 << 20)] * 4))
    eventually(lambda: rig.server.stats().connections == 0)
    assert rig.node.views == 0
    link.close()


def test_a_server_without_room_says_so(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tandem.kvstore.dataplane.server.MAX_CONNECTIONS", 1)
    rig.server.stop()
    rig.start()
    first = rig.greeted("unix")
    link = rig.connect("unix")
    with pytest.raises(HandshakeRefused, match="overloaded"):
        greet(link, PeerIdentity("me"))
    link.close()
    first.close()
