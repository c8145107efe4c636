"""Frames between two ends that are slow, silent, gone, or wrong."""

from __future__ import annotations

import os
import socket
import threading
from types import SimpleNamespace

import pytest

from tandem.wire import link as link_module
from tandem.wire.header import Header, ProtocolError, VersionMismatch
from tandem.wire.link import MAX_UNSENT_BYTES, PACE_BYTES, Link, LinkClosed, Patience
from tandem.wire.protocol import Nothing

from .notes import MAX_BODY, NOTES, PATIENCE, VERSION, Kind, Note, linked, notes

DEADLINE_S = 30.0
IMPATIENT = Patience(connect_s=0.2, stall_s=0.2)


def test_frames_bodies_and_payloads_arrive_in_order() -> None:
    content = os.urandom(3 << 20)
    with linked() as (left, right):
        sender = threading.Thread(target=left.send, args=(Kind.BYTES, 7, None, memoryview(content)))
        left.send(Kind.NOTE, 5, Note("first"))
        sender.start()
        header, body = right.receive(DEADLINE_S)
        assert (header.kind, header.id, body) == (Kind.NOTE, 5, Note("first"))
        header, body = right.receive(DEADLINE_S)
        assert (header.id, header.payload_length, body) == (7, len(content), Nothing())
        out = bytearray(len(content))
        right.read_into(memoryview(out))
        assert out == content
        sender.join()
        left.send(Kind.BYTES, 8, None, b"nobody wants this")
        left.send(Kind.PING, 9)
        header, _ = right.receive(DEADLINE_S)
        right.skip(header.payload_length)
        assert right.receive(DEADLINE_S)[0].id == 9


def test_threads_that_send_at_once_do_not_mix_their_frames() -> None:
    with linked() as (left, right):

        def send(number: int) -> None:
            for _ in range(50):
                left.send(Kind.BYTES, number, None, bytes([number]) * 10_000)

        senders = [threading.Thread(target=send, args=(number,)) for number in range(4)]
        for sender in senders:
            sender.start()
        out = bytearray(10_000)
        for _ in range(200):
            header, _ = right.receive(DEADLINE_S)
            right.read_into(memoryview(out))
            assert out == bytes([header.id]) * 10_000
        for sender in senders:
            sender.join()


@pytest.mark.parametrize("order", [[0, 2], [0, 0], [1], [0, 1, 3, 2]])
def test_a_frame_that_is_lost_repeated_or_swapped_is_noticed(order: list[int]) -> None:
    with linked() as (left, right):
        for number in order:
            left.sock.sendall(NOTES.frame(Kind.NOTE, 1, Note("x"), sequence=number))
        right_ones = [number == place for place, number in enumerate(order)].index(False)
        for _ in range(right_ones):
            right.receive(DEADLINE_S)
        with pytest.raises(ProtocolError, match=f"frame {order[right_ones]} where {right_ones} was due"):
            right.receive(DEADLINE_S)


def test_a_shorter_header_of_another_version_is_named_as_such() -> None:
    with linked() as (left, right):
        left.sock.sendall(notes(VERSION + 1).pack(Header(Kind.HELLO, 0))[:32])
        with pytest.raises(VersionMismatch, match=f"version {VERSION + 1}"):
            right.receive(DEADLINE_S)


def test_posts_wait_in_memory_for_a_slow_peer_and_arrive_in_order() -> None:
    count = 8000
    with linked() as (writer, reader):
        for number in range(count):
            writer.post(Kind.NOTE, number, Note("x" * 20))  # would never return if it waited for the reader
        assert writer._unsent, "the socket's buffer is meant to be too small for all"
        for number in range(count):
            assert not writer.wait_for_frame(0)
            assert reader.wait_for_frame(DEADLINE_S)
            assert reader.receive()[0].id == number
        assert not writer._unsent


def test_a_peer_that_never_reads_loses_the_connection() -> None:
    text = "x" * (MAX_BODY // 2)
    with linked() as (writer, _):
        for _ in range(MAX_UNSENT_BYTES // len(text) + 200):
            writer.post(Kind.NOTE, 1, Note(text))
            assert len(writer._unsent) <= MAX_UNSENT_BYTES + MAX_BODY
        with pytest.raises(ConnectionError):
            writer.receive()


def test_posts_after_the_end_are_quiet_and_touch_no_other_descriptor() -> None:
    left, right = socket.socketpair()
    writer, reader = Link(left, NOTES, PATIENCE), Link(right, NOTES, PATIENCE)
    reader.close()
    writer.post(Kind.PING, 1)
    writer.close()
    read_end, write_end = os.pipe()  # likely to get the number that was freed
    writer.post(Kind.PING, 1)
    writer.shutdown()
    os.close(write_end)
    assert os.read(read_end, 1) == b""
    os.close(read_end)


def test_a_shutdown_wakes_those_who_read_and_send() -> None:
    with linked() as (left, _):
        errors: list[OSError] = []

        def run(action: object, *args: object) -> None:
            try:
                action(*args)  # type: ignore[operator]
            except OSError as error:
                errors.append(error)

        threads = [
            threading.Thread(target=run, args=(left.receive,)),
            threading.Thread(target=run, args=(left.send, Kind.BYTES, 1, None, bytes(8 << 20))),
        ]
        for thread in threads:
            thread.start()
        left.shutdown()
        for thread in threads:
            thread.join(DEADLINE_S)
        assert len(errors) == 2
        assert not any(isinstance(error, TimeoutError) for error in errors)


@pytest.mark.parametrize("sent", [b"NOT", NOTES.frame(Kind.NOTE, 1, Note("x" * 100))[:-1]])
def test_a_peer_that_stops_within_a_frame_is_not_waited_for_long(sent: bytes) -> None:
    with linked(IMPATIENT) as (link, peer):
        peer.sock.send(sent)
        with pytest.raises(TimeoutError):
            link.receive()
        peer.close()
        with pytest.raises(LinkClosed):
            link.receive()


def test_a_peer_that_drips_is_not_waited_for_long() -> None:
    """Bytes that come all the time are not enough: a payload must come on."""
    with linked(IMPATIENT) as (link, peer):
        over = threading.Event()
        peer.sock.sendall(NOTES.frame(Kind.BYTES, 1, None, PACE_BYTES))

        def drip() -> None:
            while not over.wait(0.02):
                peer.sock.send(b"x")

        dripping = threading.Thread(target=drip)
        dripping.start()
        header, _ = link.receive(DEADLINE_S)
        with pytest.raises(TimeoutError, match="middle of a frame"):
            link.read_into(memoryview(bytearray(header.payload_length)))
        over.set()
        dripping.join()


def test_a_peer_that_takes_nothing_or_drips_is_not_waited_for_long() -> None:
    for piece in (0, 100):
        with linked(IMPATIENT) as (link, peer):
            over = threading.Event()

            def sip(peer: Link = peer, piece: int = piece, over: threading.Event = over) -> None:
                while piece and not over.wait(0.02):
                    peer.sock.recv(piece)

            sipping = threading.Thread(target=sip)
            sipping.start()
            with pytest.raises(TimeoutError, match="took"):
                link.send(Kind.BYTES, 1, None, bytes(16 << 20))
            over.set()
            sipping.join()


def test_a_slow_but_steady_peer_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any number of times `stall_s`, as long as enough moves in each."""
    now = [0.0]
    monkeypatch.setattr(link_module, "time", SimpleNamespace(monotonic=lambda: now[0]))
    pace = link_module._Pace(5.0)
    for _ in range(10):
        now[0] += 4.0
        assert pace.is_kept(PACE_BYTES // 2)
        now[0] += 0.9
        assert pace.is_kept(PACE_BYTES // 2)
    now[0] += 4.9
    assert pace.is_kept(PACE_BYTES - 1)
    now[0] += 0.2
    assert not pace.is_kept(0)


def test_a_peer_that_says_nothing_is_waited_for_as_long_as_was_said() -> None:
    with linked() as (link, _):
        for receive in (link.receive, link.receive_first):
            with pytest.raises(TimeoutError, match="sent nothing"):
                receive(0.05)
