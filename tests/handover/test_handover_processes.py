"""Hand-over between two processes, and what the survivor sees when the other one dies or freezes."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.processes

SENDER = Path(__file__).with_name("sender_process.py")


@pytest.fixture
def start_sender(rig):
    started = []

    def start(mode, endpoint=None):
        where = endpoint or rig.endpoint
        process = subprocess.Popen(
            [sys.executable, str(SENDER), where.unix_path, where.host, str(where.port), mode],
            stdout=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()
        process.stdout.close()


def test_another_process_hands_over(rig, start_sender):
    process = start_sender("whole")
    rig.sink.wait_for(lambda: rig.sink.finishes)
    assert process.stdout.read().split() == ["accepted", "done"]
    expected = b"".join(row.to_bytes(2, "little") * 128 for row in range(512))
    assert all(rows == expected for rows in rig.sink.data["r", 1].values())
    assert len(rig.sink.data["r", 1]) == 4


def test_a_killed_sender_is_lost_with_its_connection(rig, start_sender, eventually):
    process = start_sender("endless")
    rig.sink.wait_for(lambda: len(rig.sink.arrivals) > 20)
    process.kill()
    assert rig.sink.lost_code("r") == "peer_closed"
    eventually(lambda: rig.server.stats().open_connections == 0)
    assert rig.server.stats().open_streams == 0


def test_a_dead_receiver_is_noticed_by_the_sender(rig, start_sender):
    process = start_sender("endless")
    rig.sink.wait_for(lambda: len(rig.sink.arrivals) > 20)
    rig.server.stop()
    assert process.stdout.read().split() == ["accepted", "lost", "peer_closed"]
    assert rig.sink.lost_code("r") == "shutdown"


def test_a_frozen_sender_loses_its_lease(make_rig, start_sender):
    rig = make_rig(lease_s=0.6)
    process = start_sender("endless", rig.endpoint)
    rig.sink.wait_for(lambda: len(rig.sink.arrivals) > 20)
    process.send_signal(signal.SIGSTOP)
    code = rig.sink.lost_code("r", timeout_s=30)
    assert code in {"lease", "stalled"}
    process.send_signal(signal.SIGCONT)
    assert process.stdout.read().split()[:2] == ["accepted", "lost"]
