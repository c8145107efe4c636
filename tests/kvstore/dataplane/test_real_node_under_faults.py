"""Workers that put, fetch and lose their connections at random against one real, small node: nothing wrong is ever
read, and no lease stays."""

from __future__ import annotations

import contextlib
import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tandem.kvstore.dataplane import puts
from tandem.kvstore.dataplane.client import RemoteHomeNode
from tandem.kvstore.interfaces import Fetch
from tandem.kvstore.process.open import open_node
from tandem.kvstore.settings import StoreSettings
from tests.kvstore.chunks import NUM_LAYERS, info, is_sound, key, put
from tests.kvstore.homes import connects

NUM_OBJECTS = 60
ROOM = 30
"""Objects that fit into memory. So few that none is held ahead (`session.MIN_HELD_OBJECTS`)."""
NUM_WORKERS = 3
THREADS_EACH = 2
CUTS = 20
"""Each may take the room of one object until the test ends: what another thread of the worker was putting."""
CUT_AHEAD = THREADS_EACH * (puts.NUM_AHEAD + 1)
"""Objects whose room a cut may take where memory is held for the next puts."""
READS = 300
DEADLINE_S = 120.0


class Work:
    """Goes on until enough was read and every cut was made."""

    def __init__(self) -> None:
        self.wrong: list[str] = []
        self.read: list[int] = []
        self._cuts = 0
        self._cutting = threading.Lock()
        self._give_up_at = time.monotonic() + DEADLINE_S
        self._failed = threading.Event()

    def go_on(self) -> bool:
        if self._failed.is_set():
            return False
        assert time.monotonic() < self._give_up_at, f"only {len(self.read)} reads, {self._cuts} cuts"
        return len(self.read) < READS or self._cuts < CUTS

    def run(self, home: RemoteHomeNode, seed: int) -> None:
        chance = random.Random(seed)
        try:
            while self.go_on():
                assert connects(home, DEADLINE_S)
                self._step(home, chance)
        except BaseException:
            self._failed.set()
            raise

    def _step(self, home: RemoteHomeNode, chance: random.Random) -> None:
        number = chance.randrange(NUM_OBJECTS)
        if chance.random() < 0.4:
            put(home, number)
        elif chance.random() < 0.1:
            self._cut(home)
        else:
            numbers = list(range(number, min(number + 4, NUM_OBJECTS)))
            with contextlib.closing(home.fetch(home.locate([key(each) for each in numbers]))) as fetch:
                self._check(fetch, numbers)

    def _cut(self, home: RemoteHomeNode) -> None:
        """As if the connection broke, at any moment for the other thread of this worker."""
        with self._cutting:
            channel = home._channel
            if self._cuts < CUTS and channel is not None and channel.alive:
                channel.fail("a test")
                self._cuts += 1

    def _check(self, fetch: Fetch, numbers: list[int]) -> None:
        if not fetch.wait(NUM_LAYERS, DEADLINE_S):
            return
        for index in range(fetch.intact()):
            try:
                sound = is_sound(fetch, index, numbers[index])
            except ValueError:  # the connection was lost
                return
            if not sound and fetch.intact():  # still leased after the look: it must have been right
                self.wrong.append(f"object {numbers[index]}")
            self.read.append(numbers[index])


@pytest.mark.parametrize("disk", [False, True])
@pytest.mark.parametrize("ahead", [False, True])
def test_nothing_wrong_is_read_and_no_lease_stays(
    tmp_path: Path, disk: bool, ahead: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if ahead:  # memory is held for the next put; what a broken connection leaves stays taken until the end of the test
        monkeypatch.setattr(puts, "NEXT_S", DEADLINE_S)
    room = NUM_OBJECTS + CUTS * CUT_AHEAD if ahead else ROOM
    settings = StoreSettings(
        kv_host_bytes=room * info(0).size, kv_disk=str(tmp_path / "disk") if disk else "", kv_disk_bytes=16 << 20
    )
    path = str(tmp_path / "kv.sock")
    work = Work()
    with contextlib.closing(open_node(settings, "n", 1, unix_path=path)) as opened:
        with contextlib.ExitStack() as workers:
            homes = [RemoteHomeNode(path, f"w{number}") for number in range(NUM_WORKERS)]
            for home in homes:
                workers.callback(home.close)
            threads = workers.enter_context(ThreadPoolExecutor(NUM_WORKERS * THREADS_EACH))
            ends = [threads.submit(work.run, home, seed) for seed, home in enumerate(homes * THREADS_EACH)]
            for end in ends:
                end.result()
            opened.node.check_integrity()
        assert opened.server is not None
        deadline = time.monotonic() + DEADLINE_S
        while opened.server.stats().connections:
            assert time.monotonic() < deadline
            time.sleep(0.005)
        assert opened.node.flush(DEADLINE_S)
        opened.node.check_integrity()
        stats = opened.node.stats()
    assert work.wrong == []
    assert stats.fetches_open == 0
    assert stats.quarantined == 0
    assert stats.leases <= stats.puts_in_flight + stats.zombies + stats.loads_in_flight
