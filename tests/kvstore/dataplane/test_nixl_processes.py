"""NIXL itself between processes, one of which stops or dies: skipped where it is not installed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest

from tandem.kvstore.dataplane import nixl as nixl_module
from tandem.kvstore.dataplane.nixl import NixlAgent, NixlWindow
from tandem.kvstore.dataplane.protocol import AgentInfo
from tandem.kvstore.dataplane.windows import Outcome

from .conftest import DEADLINE_S
from .fake_nixl import arena_of
from .nixl_process import SIZE, content
from .test_nixl import INSTALLED, Kept

pytestmark = [pytest.mark.processes, pytest.mark.skipif(not INSTALLED, reason="NIXL is not installed")]
ROOT = Path(__file__).parents[3]


class Reader:
    """A process, and an agent that reads it over UCX's TCP, which needs both sides to run, as RDMA does not."""

    def __init__(self) -> None:
        self.arena = arena_of(SIZE, 0)
        self.kept = Kept()
        self.agent = NixlAgent("reader")
        self.agent.register(self.arena, self.kept)
        self.processes: list[subprocess.Popen[str]] = []

    def start(self) -> NixlWindow:
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.kvstore.dataplane.nixl_process"],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.processes.append(process)
        assert process.stdout is not None
        said = bytes.fromhex(process.stdout.readline())
        window = self.agent.open(msgspec.msgpack.decode(said, type=AgentInfo))
        assert window is not None
        return window

    def send(self, number: int) -> None:
        os.kill(self.processes[-1].pid, number)

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.communicate()
        self.agent.close()


@pytest.fixture
def reader(monkeypatch: pytest.MonkeyPatch) -> Iterator[Reader]:
    monkeypatch.setenv("UCX_TLS", "tcp")
    monkeypatch.setattr(nixl_module, "RETRY_S", 0.0)
    reader = Reader()
    yield reader
    reader.close()


def test_another_process_is_read_and_ends_in_peace(reader: Reader) -> None:
    window = reader.start()
    whole = memoryview(content())
    assert window.read([(5, reader.arena[:1000]), (4096, reader.arena[8192:])]) == [Outcome.DONE, Outcome.DONE]
    assert reader.arena[:1000] == whole[5:1005]
    assert reader.arena[8192:] == whole[4096:-4096]
    process = reader.processes[-1]
    process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 0


def test_bytes_that_come_after_a_time_out_find_their_memory_at_rest(
    reader: Reader, monkeypatch: pytest.MonkeyPatch, eventually: Callable[[Callable[[], object]], None]
) -> None:
    window = reader.start()
    assert window.read([(0, reader.arena[:10])]) == [Outcome.DONE]
    monkeypatch.setattr(nixl_module, "STALL_S", 0.2)
    reader.send(signal.SIGSTOP)
    size = SIZE // 2
    assert window.read([(100, reader.arena[size:])]) == [Outcome.LOST]
    assert reader.kept.ranges == {(size, SIZE)}
    assert window.read([(0, reader.arena[:10])]) == [Outcome.NOT_BEGUN]
    assert reader.arena[size:] == bytes(size)
    reader.send(signal.SIGCONT)
    monkeypatch.setattr(nixl_module, "STALL_S", DEADLINE_S)
    eventually(lambda: window.read([(7, reader.arena[:10])]) == [Outcome.DONE])
    assert reader.kept.ranges == set()
    whole = memoryview(content())
    assert reader.arena[size:] == whole[100 : 100 + size], "they came late"
    assert reader.arena[:10] == whole[7:17]


def test_a_process_that_dies_while_it_is_read_is_lost_and_its_successor_is_read(reader: Reader) -> None:
    window = reader.start()
    assert window.read([(0, reader.arena[:10])]) == [Outcome.DONE]
    reader.send(signal.SIGSTOP)
    outcomes: list[Outcome] = []
    thread = threading.Thread(target=lambda: outcomes.extend(window.read([(0, reader.arena)])))
    thread.start()
    while not window.running:
        assert thread.is_alive()
    reader.send(signal.SIGKILL)
    thread.join()
    assert outcomes == [Outcome.LOST]
    window.close()
    window = reader.start()
    assert window.read([(20, reader.arena[:1000])]) == [Outcome.DONE]
    assert reader.arena[:1000] == content()[20:1020]
