"""Prometheus sees what was handed over, at both ends."""

from __future__ import annotations

from prometheus_client.registry import CollectorRegistry

from tandem.handover import HandoverMetrics, Reason


def test_both_ends_tell_what_moved_and_how_streams_ended(rig, eventually):
    registries = [CollectorRegistry(), CollectorRegistry()]
    for registry, stats in zip(registries, (rig.client.stats, rig.server.stats), strict=True):
        registry.register(HandoverMetrics(stats))
    rows = rig.rows(num_tokens=100, row_bytes=64, num_layers=3)
    stream, listener = rig.open("done", rows)
    rows.send(stream)
    listener.ending()
    aborted, listener = rig.open("cancelled", rows)
    rig.sink.wait_for(lambda: ("cancelled", 1) in rig.sink.opened_streams)
    rig.open("open", rows)
    rig.sink.wait_for(lambda: ("open", 1) in rig.sink.opened_streams)
    aborted.abort(Reason("cancelled", ""))
    listener.ending()
    rig.sink.lost_code("cancelled")
    for registry in registries:

        def value(name, registry=registry, **labels):
            return registry.get_sample_value(f"tandem_handover_{name}", labels)

        assert (value("bytes_total"), value("rows_total"), value("frames_total")) == (3 * 6400, 300, 3)
        assert value("transfer_seconds_total") > 0
        assert value("streams_total", outcome="done") == 1
        assert value("streams_total", outcome="cancelled") == 1
        assert (value("open_streams"), value("open_connections")) == (1, 1)
        assert (value("late_frames_total"), value("callback_errors_total")) == (0, 0)
