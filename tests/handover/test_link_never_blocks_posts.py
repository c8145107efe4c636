"""Small frames that a receiver posts from its engine thread."""

from __future__ import annotations

import os
import socket

import pytest

from tandem.handover.frames import Kind
from tandem.handover.link import MAX_UNSENT_BYTES, Link, PeerClosed


@pytest.fixture
def pair():
    left, right = socket.socketpair()
    links = Link(left, 60.0), Link(right, 60.0)
    yield links
    for link in links:
        link.close()


def test_posts_wait_in_memory_for_a_slow_peer_and_arrive_in_order(pair):
    writer, reader = pair
    count = 5000
    for i in range(count):
        writer.post(Kind.ACK, offset=i)
    assert writer._unsent, "the socket's buffer is meant to be too small for all"
    for i in range(count):
        assert not writer.wait_readable(0)
        assert reader.wait_readable(60.0)
        assert reader.receive().offset == i
    assert not writer._unsent


def test_a_peer_that_never_reads_loses_the_connection(pair):
    writer, _ = pair
    body = bytes(8192)
    for _ in range(MAX_UNSENT_BYTES // len(body) + 200):
        writer.post(Kind.FINISH, body)
        assert len(writer._unsent) <= MAX_UNSENT_BYTES + len(body) + 64
    assert writer.wait_readable(0)
    with pytest.raises(ConnectionError):
        writer.receive()


def test_posts_after_the_end_are_quiet_and_touch_no_other_descriptor(pair):
    writer, reader = pair
    reader.close()
    writer.post(Kind.RENEW, stream=1)
    writer.close()
    read_end, write_end = os.pipe()  # likely to get the number that was freed
    writer.post(Kind.RENEW, stream=1)
    writer.shutdown()
    os.close(write_end)
    assert os.read(read_end, 1) == b""
    os.close(read_end)


def test_a_peer_that_stops_within_a_frame_is_not_waited_for_long():
    left, right = socket.socketpair()
    link = Link(left, 0.2)
    right.send(b"TDKV")
    with pytest.raises(TimeoutError):
        link.receive()
    right.close()
    with pytest.raises(PeerClosed):
        link.receive()
    link.close()
