"""Connections that break, peers that do not fit, and old attempts."""

from __future__ import annotations

import socket
from dataclasses import replace

import msgspec
import pytest

from tandem.handover import Endpoint, HandoverSettings, KvServer, PeerIdentity, Reason
from tandem.handover import connection as connection_module
from tandem.handover.frames import Rows
from tandem.wire import handshake


def test_a_wrong_digest_is_refused_for_good_and_names_both(rig):
    other = bytes(32)
    client = rig.new_client(other)
    rows = rig.rows()
    streams = [rig.open(f"r{i}", rows, client=client) for i in range(3)]
    for _, listener in streams:
        assert listener.ending() == ("refused", "incompatible"), listener.endings
        reason = listener.endings[0][1]
        assert not reason.retriable
        assert other.hex() in reason.message
        assert bytes(range(32)).hex() in reason.message
    client.close()
    assert not rig.sink.opened_streams


def test_both_ends_prove_the_secret_once_and_hand_over(make_rig):
    rig = make_rig(key=b"k" * 32)
    for number in range(3):
        rows = rig.rows(seed=number)
        stream, listener = rig.open(f"r{number}", rows)
        rows.send(stream)
        assert listener.ending() == ("done", "")
        assert rows.equal(rig.sink.data[f"r{number}", 1])
    assert rig.server.stats().open_connections == 1


@pytest.mark.parametrize(
    ("server_key", "client_key", "message"),
    [
        (b"k" * 32, b"o" * 32, "another secret"),
        (b"k" * 32, b"", "this process has none"),
        (b"", b"k" * 32, "it may have no secret"),
    ],
)
def test_without_the_same_secret_nothing_is_handed_over(make_rig, server_key, client_key, message):
    rig = make_rig(key=server_key)
    client = rig.new_client(key=client_key)
    _, listener = rig.open("r", rig.rows(), client=client)
    assert listener.ending() == ("lost", "unreachable")
    assert message in listener.endings[0][1].message
    client.close()
    assert not rig.sink.opened_streams


def test_nobody_there_is_a_loss_and_not_an_exception(rig):
    nobody = Endpoint("d", 1, rig.both.host_id, "/nonexistent/kv.sock", "127.0.0.1", 1)
    listener = rig.listener()
    rig.client.open(nobody, "r", 1, 10, 8, 1, listener).finish(b"")
    assert listener.ending() == ("lost", "unreachable")


def test_another_start_of_the_worker_is_not_taken_for_the_one_meant(rig):
    listener = rig.listener()
    rig.client.open(replace(rig.endpoint, worker_epoch=7), "r", 1, 10, 8, 1, listener)
    assert listener.ending() == ("lost", "unreachable")
    assert "epoch 7" in listener.endings[0][1].message


def test_tcp_is_used_when_the_unix_socket_leads_nowhere(rig, tmp_path):
    dead = tmp_path / "dead.sock"
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(dead))
    rows = rig.rows()
    listener = rig.listener()
    stream = rig.client.open(
        replace(rig.both, unix_path=str(dead)), "r", 1, rows.num_tokens, rows.row_bytes, rows.num_layers, listener
    )
    rows.send(stream)
    assert listener.ending() == ("done", "")
    assert rows.equal(rig.sink.data["r", 1])


def test_a_receiver_without_leases_is_not_used(rig, monkeypatch):
    """Its streams would be renewed without a pause."""
    honest = handshake.answer
    monkeypatch.setattr(handshake, "answer", lambda link, me, *, lease_s: honest(link, me, lease_s=0.0))
    _, listener = rig.open("r", rig.rows())
    assert listener.ending() == ("lost", "unreachable")
    assert "without leases" in listener.endings[0][1].message


def test_a_lower_epoch_is_fenced_off(rig):
    rows = rig.rows()
    new, new_listener = rig.open("r", rows, epoch=5)
    rig.sink.wait_for(lambda: ("r", 5) in rig.sink.opened_streams)
    _, old_listener = rig.open("r", rows, epoch=4)
    assert old_listener.ending() == ("refused", "superseded")
    assert not old_listener.endings[0][1].retriable
    rows.send(new)
    assert new_listener.ending() == ("done", "")
    _, late = rig.open("r", rows, epoch=4)
    assert late.ending() == ("refused", "superseded")
    _, again = rig.open("r", rows, epoch=5)
    assert again.ending() == ("refused", "duplicate")
    assert list(rig.sink.opened_streams) == [("r", 5)]


def test_a_higher_epoch_takes_over_from_another_sender(rig):
    rows = rig.rows()
    _, old_listener = rig.open("r", rows, epoch=1)
    rig.sink.wait_for(lambda: ("r", 1) in rig.sink.opened_streams)
    second = rig.new_client()
    new, new_listener = rig.open("r", rows, epoch=2, client=second)
    assert old_listener.ending() == ("lost", "superseded")
    assert rig.sink.lost_code("r", 1) == "superseded"
    rows.send(new)
    assert new_listener.ending() == ("done", "")
    second.close()


def test_damaged_rows_lose_their_stream_and_no_other(rig, monkeypatch):
    rows = rig.rows()
    honest = connection_module.checksum
    marked = bytes([0xEE]) * rows.row_bytes

    def damaged(payload):
        return honest(payload) ^ (payload[: rows.row_bytes] == marked)

    monkeypatch.setattr(connection_module, "checksum", damaged)
    bad, bad_listener = rig.open("bad", rows)
    good, good_listener = rig.open("good", rows)

    def fill(start, stop, out):
        out[:] = marked * (stop - start)

    bad.send_layer(0, 0, 10, fill)
    bad.send_layer(1, 0, 10, rows.fill(1))
    rows.send(good)
    assert bad_listener.ending() == ("lost", "checksum")
    assert good_listener.ending() == ("done", "")
    assert rig.sink.lost_code("bad") == "checksum"
    assert rig.server.stats().outcomes["checksum"] == 1
    assert not any(request == "bad" and layer == 0 for request, layer, _, _ in rig.sink.arrivals)


@pytest.mark.parametrize(
    "change",
    [
        {"layer": 3},
        {"start": 35, "stop": 45},
        {"start": 4},
        {"start": 20, "stop": 20},
        {"start": 21, "stop": 20},
    ],
)
def test_rows_outside_the_stream_lose_it_and_no_other(rig, monkeypatch, change):
    rig.sink.skip = 5
    rows = rig.rows(num_tokens=40, num_layers=3)

    def damaged(layer, start, stop, *more):
        built = Rows(layer, start, stop, *more)
        return msgspec.structs.replace(built, **change) if (layer, start, stop) == (0, 5, 15) else built

    monkeypatch.setattr(connection_module, "Rows", damaged)
    bad, bad_listener = rig.open("bad", rows)
    good, good_listener = rig.open("good", rows)
    bad.send_layer(0, 5, 15, rows.fill(0))
    rows.send(good)
    assert bad_listener.ending() == ("lost", "range")
    assert good_listener.ending() == ("done", "")
    assert rig.sink.lost_code("bad") == "range"
    assert not any(request == "bad" for request, *_ in rig.sink.arrivals)


@pytest.mark.parametrize("change", [{"length": 639}, {"length": 641}])
def test_rows_whose_length_is_not_that_of_their_place_are_never_taken(rig, transport, monkeypatch, change):
    rows = rig.rows(num_tokens=40, num_layers=3)

    def damaged(*fields):
        return msgspec.structs.replace(Rows(*fields), **change)

    monkeypatch.setattr(connection_module, "Rows", damaged)
    stream, listener = rig.open("r", rows)
    stream.send_layer(0, 0, 10, rows.fill(0))
    # In the byte stream nobody knows where the next frame would begin.
    assert listener.ending()[1] == "range" if transport == "unix" else listener.ending()[0] == "lost"
    assert rig.sink.lost_code("r") == ("range" if transport == "unix" else "protocol")
    assert rig.sink.arrivals == []


def test_a_stopped_server_is_noticed_by_every_stream(rig):
    rig.sink.skip = None
    listeners = [rig.open(f"r{i}", rig.rows())[1] for i in range(5)]
    rig.sink.wait_for(lambda: len(rig.sink.opened_streams) == 5)
    rig.server.stop()
    for i, listener in enumerate(listeners):
        assert listener.ending() == ("lost", "peer_closed")
        assert rig.sink.lost_code(f"r{i}") == "shutdown"


def test_a_closed_pool_loses_its_streams_on_both_sides(rig):
    rig.sink.skip = None
    _, listener = rig.open("r", rig.rows())
    rig.sink.wait_for(lambda: rig.sink.opened_streams)
    rig.client.close()
    assert listener.ending() == ("lost", "shutdown")
    assert rig.sink.lost_code("r") == "peer_closed"
    with pytest.raises(RuntimeError, match="closed"):
        rig.open("s", rig.rows())


def test_a_new_connection_follows_a_broken_one(rig, tmp_path):
    rows = rig.rows()
    _, listener = rig.open("r", rows)
    rig.sink.wait_for(lambda: rig.sink.opened_streams)
    rig.server.stop()
    assert listener.ending() == ("lost", "peer_closed")
    port = rig.endpoint.port or rig.both.port
    path = tmp_path / "0" / "kv.sock"
    with_settings = KvServer(path, ("127.0.0.1", port), PeerIdentity("d", 1, bytes(range(32))), rig.sink, rig.settings)
    with_settings.start()
    try:
        stream, listener = rig.open("r", rows, epoch=2)
        rows.send(stream)
        assert listener.ending() == ("done", "")
        assert rows.equal(rig.sink.data["r", 2])
    finally:
        with_settings.stop()


def test_a_silent_receiver_is_given_up(make_rig, transport, tmp_path):
    """One that accepts connections and then says nothing, in the handshake and after it."""
    rig = make_rig(stall_timeout_s=0.4)
    rig.sink.gate.clear()
    rows = rig.rows()
    stream, listener = rig.open("r", rows)
    rows.send(stream)
    assert listener.ending() == ("lost", "stalled")
    rig.settings = HandoverSettings(connect_timeout_s=0.2)
    hasty = rig.new_client()
    with socket.create_server(("127.0.0.1", 0)) as silent:
        host, port = silent.getsockname()
        listener = rig.listener()
        hasty.open(Endpoint("d", 1, host=host, port=port), "s", 1, 10, 8, 1, listener)
        assert listener.ending() == ("lost", "unreachable")
    hasty.close()


def test_a_sender_that_says_nothing_after_connecting_is_dropped(make_rig):
    rig = make_rig(connect_timeout_s=0.2)
    with socket.create_connection((rig.both.host, rig.both.port)) as sock:
        sock.settimeout(60)
        assert sock.recv(1) == b""


def test_a_server_takes_a_bounded_number_of_connections_and_streams(make_rig, eventually):
    rig = make_rig(max_connections=1, max_streams=2)
    rig.sink.skip = None
    for name in ("a", "b"):
        rig.open(name, rig.rows())
    rig.sink.wait_for(lambda: len(rig.sink.opened_streams) == 2)
    _, third = rig.open("c", rig.rows())
    assert third.ending() == ("refused", "overloaded")
    assert third.endings[0][1].retriable
    second = rig.new_client()
    _, fourth = rig.open("d", rig.rows(), client=second)
    assert fourth.ending()[1] in {"overloaded", "unreachable"}
    second.close()
    rig.server.close_stream("a", 1, Reason("cancelled", ""))
    eventually(lambda: rig.client.stats().open_streams == 1)
    rig.sink.skip = 0
    stream, listener = rig.open("e", rig.rows())
    rig.rows().send(stream)
    assert listener.ending() == ("done", "")
