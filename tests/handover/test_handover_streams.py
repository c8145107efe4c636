"""What happens to one stream between two healthy workers."""

from __future__ import annotations

import threading

import pytest

from tandem.handover import Reason


def test_rows_and_finish_payload_arrive_unchanged(rig):
    rows = rig.rows(num_tokens=1000, row_bytes=96, num_layers=4)
    stream, listener = rig.open("r", rows)
    rows.send(stream, b"the first token")
    assert listener.ending() == ("done", "")
    assert listener.accepted == 0
    assert rows.equal(rig.sink.data["r", 1])
    assert rig.sink.finishes == {("r", 1): b"the first token"}
    assert not rig.sink.losses


def test_a_range_larger_than_a_frame_is_split_and_put_together(make_rig):
    rig = make_rig(frame_bytes=1000, arena_bytes=4096)
    rows = rig.rows(num_tokens=101, row_bytes=96, num_layers=2)
    stream, listener = rig.open("r", rows)
    rows.send(stream)
    assert listener.ending() == ("done", "")
    assert rows.equal(rig.sink.data["r", 1])
    assert max(stop - start for _, _, start, stop in rig.sink.arrivals) == 10


def test_layers_sent_in_chunks_while_prefill_computes_arrive_unchanged(rig):
    rows = rig.rows(num_tokens=90, num_layers=3)
    stream, listener = rig.open("r", rows)
    for start in (0, 30, 60):
        for layer in range(3):
            stream.send_layer(layer, start, start + 30, rows.fill(layer))
            rig.sink.wait_for(lambda layer=layer, start=start: ("r", layer, start, start + 30) in rig.sink.arrivals)
    stream.finish(b"")
    assert listener.ending() == ("done", "")
    assert rows.equal(rig.sink.data["r", 1])


def test_rows_below_the_receivers_skip_are_not_sent(rig):
    rig.sink.skip = 25
    rows = rig.rows(num_tokens=40)
    stream, listener = rig.open("r", rows)
    for start in (0, 20, 30):
        for layer in range(3):
            stream.send_layer(layer, start, {0: 20, 20: 30, 30: 40}[start], rows.fill(layer))
    stream.finish(b"")
    assert listener.ending() == ("done", "")
    assert listener.accepted == 25
    assert sorted(rig.sink.arrivals) == sorted(
        ("r", layer, start, stop) for layer in range(3) for start, stop in ((25, 30), (30, 40))
    )
    assert rows.equal(rig.sink.data["r", 1], skip=25)


def test_a_receiver_that_has_everything_gets_only_the_finish(rig):
    rig.sink.skip = 40
    rows = rig.rows(num_tokens=40)
    stream, listener = rig.open("r", rows)
    rows.send(stream)
    assert listener.ending() == ("done", "")
    assert rig.sink.arrivals == []


def test_rows_wait_for_an_accept_from_another_thread(rig):
    rig.sink.skip = None
    rows = rig.rows()
    stream, listener = rig.open("r", rows)
    rows.send(stream)
    rig.sink.wait_for(lambda: rig.sink.opened_streams)
    assert rig.sink.arrivals == []
    incoming = rig.sink.opened_streams["r", 1]
    answer = threading.Thread(target=incoming.accept, args=(0,))
    answer.start()
    assert listener.ending() == ("done", "")
    answer.join()
    assert incoming.accept(0) is False
    assert rows.equal(rig.sink.data["r", 1])


def test_a_refusal_reaches_the_sender_with_its_reason(rig):
    rig.sink.skip = None
    stream, listener = rig.open("r", rig.rows())
    rig.rows().send(stream)
    rig.sink.wait_for(lambda: rig.sink.opened_streams)
    assert rig.sink.opened_streams["r", 1].refuse(Reason("no_blocks", "the pool is full", retriable=False))
    assert listener.ending() == ("refused", "no_blocks")
    assert listener.endings[0][1] == Reason("no_blocks", "the pool is full", retriable=False)
    assert rig.sink.arrivals == []
    assert not rig.sink.losses


@pytest.mark.parametrize("answered", [True, False])
def test_an_abort_ends_both_sides(rig, answered):
    rig.sink.skip = 0 if answered else None
    rows = rig.rows()
    stream, listener = rig.open("r", rows)
    rig.sink.wait_for(lambda: rig.sink.opened_streams)
    stream.send_layer(0, 0, 10, rows.fill(0))
    stream.abort(Reason("cancelled", "the client went away"))
    assert listener.ending() == ("lost", "cancelled")
    assert rig.sink.lost_code("r") == "cancelled"
    stream.send_layer(1, 0, 10, rows.fill(1))
    stream.abort(Reason("again", ""))
    assert len(listener.endings) == 1


@pytest.mark.parametrize("answered", [True, False])
def test_the_decode_side_can_end_a_stream(rig, answered, eventually):
    rig.sink.skip = 0 if answered else None
    rows = rig.rows()
    stream, listener = rig.open("r", rows)
    rig.sink.wait_for(lambda: rig.sink.opened_streams)
    assert rig.server.close_stream("r", 1, Reason("deadline_exceeded", "too late"))
    assert listener.ending(1.0) == ("lost" if answered else "refused", "deadline_exceeded")
    assert not rig.server.close_stream("r", 1, Reason("deadline_exceeded", "too late"))
    stream.send_layer(0, 0, 10, rows.fill(0))
    assert not rig.sink.losses
    assert rig.server.stats().open_streams == 0
    eventually(lambda: rig.client.stats().open_streams == 0)


def test_a_sink_that_does_not_want_the_rows_ends_the_stream(rig):
    rig.sink.wanted = False
    rows = rig.rows()
    stream, listener = rig.open("r", rows)
    rows.send(stream)
    assert listener.ending() == ("lost", "gone")
    assert not rig.sink.losses


def test_an_incomplete_finish_is_not_acknowledged(rig):
    rig.sink.complete = False
    stream, listener = rig.open("r", rig.rows())
    stream.finish(b"")
    assert listener.ending() == ("lost", "gone")


def test_a_fill_that_fails_ends_only_its_stream(rig):
    rows = rig.rows()
    bad, bad_listener = rig.open("bad", rows)
    good, good_listener = rig.open("good", rows)

    def explode(start, stop, out):
        raise RuntimeError("no such block")

    bad.send_layer(0, 0, 10, explode)
    rows.send(good)
    assert bad_listener.ending() == ("lost", "source")
    assert good_listener.ending() == ("done", "")
    assert rig.sink.lost_code("bad") == "source"
    assert rig.client.stats().callback_errors == 1


def test_a_sink_that_raises_loses_only_that_stream(rig, monkeypatch):
    rows = rig.rows()
    honest = rig.sink.rows

    def rows_of(request_id, *args):
        if request_id == "bad":
            raise RuntimeError("sink bug")
        return honest(request_id, *args)

    monkeypatch.setattr(rig.sink, "rows", rows_of)
    bad, bad_listener = rig.open("bad", rows)
    good, good_listener = rig.open("good", rows)
    rows.send(bad)
    rows.send(good)
    assert bad_listener.ending() == ("lost", "sink")
    assert good_listener.ending() == ("done", "")
    assert rig.sink.lost_code("bad") == "sink"


def test_a_payload_cannot_be_read_after_the_call(rig, monkeypatch):
    kept = []

    def keep(request_id, epoch, layer, start, stop, payload):
        kept.append(payload)
        return True

    monkeypatch.setattr(rig.sink, "rows", keep)
    stream, listener = rig.open("r", rig.rows())
    rig.rows().send(stream)
    assert listener.ending() == ("done", "")
    with pytest.raises(ValueError, match="released"):
        bytes(kept[0])


def test_no_fill_runs_after_the_last_callback(rig):
    rows = rig.rows()
    stream, listener = rig.open("r", rows)
    entered, go_on = threading.Event(), threading.Event()

    def slow(start, stop, out):
        entered.set()
        assert go_on.wait(60)
        assert not listener.endings
        rows.fill(0)(start, stop, out)

    stream.send_layer(0, 0, 10, slow)
    assert entered.wait(60)
    rig.server.close_stream("r", 1, Reason("cancelled", ""))
    other, other_listener = rig.open("other", rows)
    other.abort(Reason("cancelled", ""))
    assert not listener.endings
    go_on.set()
    assert listener.ending() == ("lost", "cancelled")
    assert other_listener.ending() == ("lost", "cancelled")


def test_sizes_that_make_no_sense_are_refused_at_once(rig):
    rows = rig.rows()
    for bad in ({"num_tokens": 0}, {"row_bytes": 0}, {"num_layers": 0}, {"row_bytes": 2 << 20}):
        size = {"num_tokens": 1, "row_bytes": 1, "num_layers": 1} | bad
        with pytest.raises(ValueError, match="row"):
            rig.client.open(rig.endpoint, "r", 1, listener=rig.listener(), **size)
    stream, _ = rig.open("r", rows)
    for layer, start, stop in ((3, 0, 1), (-1, 0, 1), (0, -1, 1), (0, 2, 1), (0, 0, 41)):
        with pytest.raises(ValueError, match="layer"):
            stream.send_layer(layer, start, stop, rows.fill(0))
    stream.finish(b"")
    with pytest.raises(ValueError, match="finished"):
        stream.finish(b"")


def test_statistics_count_what_moved(rig, eventually):
    rows = rig.rows(num_tokens=100, row_bytes=64, num_layers=3)
    stream, listener = rig.open("r", rows)
    rows.send(stream)
    listener.ending()
    for stats in (rig.client.stats(), rig.server.stats()):
        assert (stats.bytes, stats.rows, stats.frames) == (3 * 6400, 300, 3)
        assert stats.outcomes == {"done": 1}
        assert stats.transfer_s > 0
        assert (stats.open_streams, stats.open_connections) == (0, 1)
