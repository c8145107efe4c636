"""Engines on a real store node with a disk below: saved by one, loaded from host memory and, after a restart, from
disk by others."""

from __future__ import annotations

import random
from pathlib import Path

from tandem.engine.store.cache import EngineStore
from tandem.kvstore.interfaces import TierName
from tandem.kvstore.node import KvNode, NodeSettings
from tandem.kvstore.tiers.disk import DiskTier
from tests.engine.store.conftest import CHUNK, assert_same, report_of
from tests.engine_harness import EngineUnderTest, wait_for

RNG = random.Random(17)
PROMPT = [RNG.randrange(3, 512) for _ in range(150)]


def open_node(directory: Path, epoch: int) -> KvNode:
    settings = NodeSettings(node_id="n1", epoch=epoch, host_id="h1", host_bytes=8 << 20)
    node = KvNode(settings, tiers=[DiskTier(directory, 64 << 20)])
    node.start()
    return node


def test_through_host_memory_and_disk(folder: Path, tmp_path: Path, plain: EngineUnderTest) -> None:
    expected = plain.submit("real", PROMPT, max_tokens=40, logprobs=0)
    node = open_node(tmp_path / "kv", 1)
    try:
        for name, tier in (("first", None), ("second", "host")):
            with EngineUnderTest(folder, EngineStore(node, chunk_tokens=CHUNK)) as engine:
                key = engine.submit(name, PROMPT, max_tokens=40, logprobs=0)
                assert_same(engine, key, plain, expected)
                assert report_of(engine, key).cached_by_tier == ({} if tier is None else {tier: 128})
                assert engine.engine.wait_saved(10)
        chunks = (150 + 39) // CHUNK
        wait_for(lambda: sum(TierName.DISK in stored.tiers for stored in node.lookups.objects()) == chunks)
        node.check_integrity()
    finally:
        node.close()
    node = open_node(tmp_path / "kv", 2)
    try:
        with EngineUnderTest(folder, EngineStore(node, chunk_tokens=CHUNK)) as engine:
            key = engine.submit("third", PROMPT, max_tokens=40, logprobs=0)
            assert_same(engine, key, plain, expected)
            assert report_of(engine, key).cached_by_tier == {"disk": 128}
        node.check_integrity()
        assert not node.stats().leases
    finally:
        node.close()
