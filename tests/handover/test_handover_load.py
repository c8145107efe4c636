"""Many streams, little memory, slow receivers, and what is left after hundreds of connections."""

from __future__ import annotations

import gc
import threading

from tandem.handover import Reason

LEASE_S = 1.0
"""A sender renews several times as often, so its thread may be late."""


def test_a_slow_receiver_with_a_small_arena_gets_everything(make_rig):
    """Backpressure, with the ring going round many times."""
    rig = make_rig(stall_timeout_s=60.0, arena_bytes=8192, frame_bytes=4096)
    rows = rig.rows(num_tokens=300, row_bytes=128, num_layers=6)
    rig.sink.gate.clear()
    streams = [rig.open(f"r{i}", rows) for i in range(4)]
    for stream, _ in streams:
        rows.send(stream)
    assert not any(listener.endings for _, listener in streams), "send_layer must not wait for the receiver"
    rig.sink.gate.set()
    for i, (_, listener) in enumerate(streams):
        assert listener.ending() == ("done", "")
        assert rows.equal(rig.sink.data[f"r{i}", 1])


def test_fifty_streams_arrive_unmixed(rig):
    wanted = [rig.rows(num_tokens=20 + i, row_bytes=64, num_layers=3, seed=i) for i in range(50)]
    opened = [rig.open(f"r{i}", rows) for i, rows in enumerate(wanted)]
    senders = [
        threading.Thread(target=rows.send, args=(stream,)) for rows, (stream, _) in zip(wanted, opened, strict=True)
    ]
    for sender in senders:
        sender.start()
    for i, (_, listener) in enumerate(opened):
        assert listener.ending() == ("done", "")
        assert wanted[i].equal(rig.sink.data[f"r{i}", 1])
    for sender in senders:
        sender.join()


def test_a_long_prompt_does_not_hold_up_a_short_one(make_rig):
    """Streams take turns frame by frame: two rounds are enough for a stream of two frames."""
    rig = make_rig(frame_bytes=4096, arena_bytes=8192)
    rig.sink.skip = None
    long_rows, short_rows = rig.rows(num_tokens=640, num_layers=4), rig.rows(num_tokens=64, num_layers=2)
    long_stream, long_listener = rig.open("long", long_rows)
    short_stream, short_listener = rig.open("short", short_rows)
    long_rows.send(long_stream)
    short_rows.send(short_stream)
    rig.sink.wait_for(lambda: len(rig.sink.opened_streams) == 2)
    rig.sink.gate.clear()
    rig.sink.opened_streams["long", 1].accept(0)
    rig.sink.opened_streams["short", 1].accept(0)
    short_listener.wait_for(lambda: short_listener.accepted is not None)
    rig.sink.gate.set()
    assert short_listener.ending() == ("done", "")
    assert long_listener.ending() == ("done", "")
    order = [request for request, *_ in rig.sink.arrivals]
    assert order.count("long") == 40
    last_short = len(order) - 1 - order[::-1].index("short")
    # The server may have sent on as long as Accept travelled, in the byte stream or up to the arena's size.
    assert order[last_short - 3 : last_short + 1].count("short") == 2


def test_an_open_that_is_answered_late_keeps_its_lease(make_rig):
    rig = make_rig(lease_s=LEASE_S)
    rig.sink.skip = None
    rows = rig.rows()
    stream, listener = rig.open("r", rows)
    rows.send(stream)
    rig.sink.wait_for(lambda: rig.sink.opened_streams)
    with rig.sink.changed:
        assert not rig.sink.changed.wait_for(lambda: rig.sink.losses, 2 * LEASE_S)
    rig.sink.opened_streams["r", 1].accept(0)
    assert listener.ending() == ("done", "")


def test_a_sink_slower_than_the_lease_does_not_cost_the_senders_theirs(make_rig):
    rig = make_rig(lease_s=LEASE_S, arena_bytes=8192, frame_bytes=4096)
    rows = rig.rows(num_tokens=600, num_layers=1)
    streams = [rig.open(f"r{i}", rows) for i in range(3)]
    rig.sink.wait_for(lambda: len(rig.sink.opened_streams) == 3)
    rig.sink.gate.clear()
    for stream, _ in streams:
        rows.send(stream)
    opener = threading.Timer(2 * LEASE_S, rig.sink.gate.set)
    opener.start()
    for _, listener in streams:
        assert listener.ending() == ("done", "")
    opener.join()
    assert not rig.sink.losses


def test_a_stream_that_is_no_longer_renewed_is_lost_alone(make_rig, monkeypatch):
    rig = make_rig(lease_s=LEASE_S)
    rig.sink.skip = None
    forgotten, _ = rig.open("forgotten", rig.rows())
    _, kept_listener = rig.open("kept", rig.rows())
    rig.sink.wait_for(lambda: len(rig.sink.opened_streams) == 2)
    forgotten.announced = False
    assert rig.sink.lost_code("forgotten") == "lease"
    assert "kept" not in {request for request, _ in rig.sink.losses}
    assert not kept_listener.endings


def test_two_hundred_connections_leave_no_descriptors_or_threads(rig, open_descriptors, eventually):
    rows = rig.rows(num_tokens=4, num_layers=1)

    def once(i: int) -> None:
        client = rig.new_client()
        stream, listener = rig.open(f"r{i}", rows, client=client)
        if i % 4 == 3:
            stream.abort(Reason("cancelled", ""))
        else:
            rows.send(stream)
        listener.ending()
        client.close()

    for i in range(4):
        once(i)
    eventually(lambda: rig.server.stats().open_connections == 0)
    gc.collect()
    before = open_descriptors(), threading.active_count()
    for i in range(4, 204):
        once(i)
    eventually(lambda: rig.server.stats().open_connections == 0)
    eventually(lambda: (open_descriptors(), threading.active_count()) <= before)
    assert rig.server.stats().open_streams == 0
