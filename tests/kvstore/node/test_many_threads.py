"""Many threads on one small node: every byte that is read is right, and the books balance while they work."""

from __future__ import annotations

import random
import threading
import time

from tandem.kvstore.eviction import DEFAULT_POLICY
from tandem.kvstore.interfaces import TierName
from tandem.kvstore.node import KvNode
from tests.kvstore.node.fakes import (
    LAYERS,
    SIZE,
    DictDirectory,
    DictTier,
    DirectPeers,
    bundle_of,
    eventually,
    key_of,
    make_settings,
    put,
    spec_of,
)

KEYS = 24
READS = 200
"""What each reader reads at least, while the others work."""
DEADLINE_S = 120.0


def test_readers_writers_and_operators_at_once() -> None:
    directory, peers = DictDirectory(), DirectPeers()
    faulty = random.Random(3)
    nodes = []
    for name in ("a", "b"):
        disk = DictTier(
            capacity_bytes=10 * SIZE, fault=lambda operation, key: operation != "info" and faulty.random() < 0.02
        )
        node = KvNode(
            make_settings(8, node_id=name, eviction=DEFAULT_POLICY), tiers=[disk], directory=directory, peers=peers
        )
        node.start()
        assert node.wait_indexed(60)
        peers.nodes[name] = node
        nodes.append(node)
    content = {key_of(number): bundle_of(spec_of(number)) for number in range(KEYS)}
    errors: list[BaseException] = []
    read = [0] * 4
    give_up_at = time.monotonic() + DEADLINE_S

    def goes_on() -> bool:
        assert time.monotonic() < give_up_at, f"only {read} reads"
        return not errors and min(read) < READS

    def work(index: int) -> None:
        rng = random.Random(index)
        try:
            while goes_on():
                node, first = rng.choice(nodes), rng.randrange(KEYS)
                if rng.random() < 0.4:
                    put(node, spec_of(first))
                    continue
                keys = [key_of((first + step) % KEYS) for step in range(3)]
                with node.fetch(node.locate(keys)) as fetch:
                    if rng.random() < 0.8:
                        fetch.wait(LAYERS, 60)
                    for place in range(fetch.intact()):
                        assert bytes(fetch.buffer(place)) == content[fetch.sources[place].key]
                        read[index] += 1
        except BaseException as error:
            errors.append(error)

    def operate() -> None:
        rng = random.Random(99)
        try:
            while goes_on():
                node, key = rng.choice(nodes), key_of(rng.randrange(KEYS))
                rng.choice(
                    (
                        lambda node=node, key=key: node.quarantine(key, "test"),
                        lambda node=node, key=key: node.commands.pin(key, "me", 0.05, rng.random() < 0.5),
                        lambda node=node, key=key: node.commands.move(key, TierName.DISK),
                        lambda node=node: node.scrub.run(2),
                        lambda node=node: node.janitor.reap(),
                        lambda node=node: node.stats(),
                        lambda node=node: node.check_integrity(),
                    )
                )()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    threads.append(threading.Thread(target=operate))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    for node in nodes:
        assert node.flush(60)
        eventually(lambda node=node: node.stats().leases == 0)
        node.check_integrity()
        node.close()
