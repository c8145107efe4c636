"""Workers that put, fetch and lose their connections at random against one real, small node: nothing wrong is ever
read, and no lease stays."""

from __future__ import annotations

import random
import threading
import time
from pathlib import Path

import pytest

from tandem.kvstore.dataplane import puts
from tandem.kvstore.dataplane.client import RemoteHomeNode
from tandem.kvstore.interfaces import Fetch
from tandem.kvstore.open import open_node
from tandem.kvstore.settings import StoreSettings
from tests.kvstore.chunks import NUM_LAYERS, is_sound, key, put

NUM_OBJECTS = 40
"""Of which half fit into memory."""
DEADLINE_S = 60.0


def work(home: RemoteHomeNode, seed: int, steps: int, wrong: list[str], read: list[int]) -> None:
    chance = random.Random(seed)
    for _ in range(steps):
        number = chance.randrange(NUM_OBJECTS)
        home.wait_connected(DEADLINE_S)
        if chance.random() < 0.4:
            put(home, number)
        elif chance.random() < 0.1 and (channel := home._channel) is not None:
            channel.fail("a test")  # as if the connection broke, at any moment for the other threads of this worker
        else:
            numbers = range(number, min(number + 4, NUM_OBJECTS))
            fetch = home.fetch(home.locate([key(each) for each in numbers]))
            check(fetch, list(numbers), wrong, read)
            fetch.close()


def check(fetch: Fetch, numbers: list[int], wrong: list[str], read: list[int]) -> None:
    if not fetch.wait(NUM_LAYERS, DEADLINE_S):
        return
    for index in range(fetch.intact()):
        try:
            sound = is_sound(fetch, index, numbers[index])
        except ValueError:  # the connection was lost
            return
        if not sound and fetch.intact():  # still leased after the look: it must have been right
            wrong.append(f"object {numbers[index]}")
        read.append(numbers[index])


@pytest.mark.parametrize("disk", [False, True])
@pytest.mark.parametrize("ahead", [False, True])
def test_nothing_wrong_is_read_and_no_lease_stays(
    tmp_path: Path, disk: bool, ahead: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if ahead:  # memory is held for the next put; what a broken connection leaves stays taken until the end of the test
        monkeypatch.setattr(puts, "NEXT_S", DEADLINE_S)
    settings = StoreSettings(
        kv_host_bytes=(16 if ahead else 2) << 20, kv_disk=str(tmp_path / "disk") if disk else "", kv_disk_bytes=16 << 20
    )
    opened = open_node(settings, "n", 1, unix_path=str(tmp_path / "kv.sock"))
    homes = [RemoteHomeNode(str(tmp_path / "kv.sock"), f"w{number}") for number in range(3)]
    wrong: list[str] = []
    read: list[int] = []
    threads = [threading.Thread(target=work, args=(homes[number % 3], number, 200, wrong, read)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    opened.node.check_integrity()
    for home in homes:
        home.close()
    deadline = time.monotonic() + DEADLINE_S
    while opened.server is not None and opened.server.stats().connections:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    assert opened.node.flush(DEADLINE_S)
    opened.node.check_integrity()
    stats = opened.node.stats()
    assert wrong == []
    assert len(read) > 20
    assert stats.fetches_open == 0
    assert stats.quarantined == 0
    assert stats.leases <= stats.puts_in_flight + stats.zombies + stats.loads_in_flight
    opened.close()
