"""A router that applies the events of a worker's prefix cache knows what is in it."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tandem.engine.request import RequestKey
from tandem.engine.schedule.block_manager import BlockManager, IntegrityError
from tandem.engine.schedule.cache_events import CacheFollower, CacheLog
from tandem.kvstore.identity import BlockHash, prefix_chain, request_namespace
from tandem.proto import worker_pb2
from tests.engine_harness import ROOT, EngineUnderTest, tiny_llama
from tests.worker.test_worker_sessions import Worker

BLOCK = 4
HASHES = [BlockHash(bytes([n]) * 32) for n in range(256)]


class Router:
    """Does what the messages say."""

    def __init__(self) -> None:
        self.known: set[bytes] = set()
        self.resets = 0

    def apply(self, events: worker_pb2.CacheEvents) -> None:
        if events.reset:
            self.known.clear()
            self.resets += 1
        self.known.difference_update(hashes(events.removed))
        self.known.update(hashes(events.stored))

    def catch_up(self, follower: CacheFollower) -> None:
        while follower.behind:
            self.apply(follower.take())


def hashes(joined: bytes) -> list[bytes]:
    assert len(joined) % 32 == 0
    return [joined[i : i + 32] for i in range(0, len(joined), 32)]


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    num_blocks=st.integers(2, 24),
    log_entries=st.integers(1, 30),
    message_entries=st.integers(1, 8),
)
def test_a_follower_knows_what_the_block_manager_holds(
    seed: int, num_blocks: int, log_entries: int, message_entries: int
) -> None:
    rng = random.Random(seed)
    blocks = BlockManager(num_blocks, BLOCK)
    blocks.cache_log = CacheLog(log_entries)
    follower, router = CacheFollower(blocks.cache_log, message_entries), Router()
    held: dict[RequestKey, list[BlockHash]] = {}
    for step in range(80):
        if held and rng.random() < 0.4:
            key = rng.choice(sorted(held))
            blocks.free(key)
            del held[key]
        else:
            key = RequestKey(str(step), 0)
            tokens = [rng.randrange(2) for _ in range(rng.randint(1, 22))]
            chain = prefix_chain(request_namespace(ROOT, b""), tokens, BLOCK)
            if blocks.allocate(key, len(tokens), chain) is not None:
                held[key] = chain
                for index in range(rng.randint(0, len(chain))):
                    blocks.publish(key, index, chain[index])
        if follower.behind and rng.random() < 0.3:
            router.apply(follower.take())
        if rng.random() < 0.1:
            router.catch_up(follower)
            assert router.known == blocks._by_hash.keys()
    router.catch_up(follower)
    assert router.known == blocks._by_hash.keys()
    blocks.check_integrity()


def test_the_first_message_says_that_it_is_all_there_is() -> None:
    for present in (0, 3):
        log = CacheLog()
        for block_hash in HASHES[:present]:
            log.stored(block_hash)
        events = CacheFollower(log).take()
        assert events.reset
        assert set(hashes(events.stored)) == set(HASHES[:present])


def test_a_large_cache_comes_in_several_messages() -> None:
    log = CacheLog()
    for block_hash in HASHES:
        log.stored(block_hash)
    follower, router, messages = CacheFollower(log, message_entries=100), Router(), 0
    while follower.behind:
        router.apply(follower.take())
        messages += 1
    assert messages == 3
    assert router.resets == 1
    assert router.known == set(HASHES)


def test_a_change_and_its_reverse_leave_no_trace_in_a_message() -> None:
    log = CacheLog()
    follower = CacheFollower(log)
    follower.take()
    log.stored(HASHES[0])
    log.removed(HASHES[0])
    log.stored(HASHES[1])
    events = follower.take()
    assert hashes(events.stored) == [HASHES[1]]
    assert hashes(events.removed) == [HASHES[0]]
    assert not follower.behind


def test_who_falls_too_far_behind_begins_again() -> None:
    log = CacheLog(entries=10)
    slow, quick = (CacheFollower(log), Router()), (CacheFollower(log), Router())
    slow[1].catch_up(slow[0])
    for block_hash in HASHES:
        log.stored(block_hash)
        quick[1].catch_up(quick[0])
    slow[1].catch_up(slow[0])
    assert slow[1].known == quick[1].known == set(HASHES)
    assert (slow[1].resets, quick[1].resets) == (2, 1)


def test_the_books_do_not_balance_if_routers_are_told_something_else() -> None:
    blocks = BlockManager(4, BLOCK)
    blocks.cache_log.stored(HASHES[0])
    with pytest.raises(IntegrityError, match="another cache"):
        blocks.check_integrity()


# Through a session


@pytest.fixture
async def worker(tmp_path: Path) -> AsyncIterator[Worker]:
    worker = Worker()
    await worker.start(tmp_path)
    yield worker
    await worker.stop()


async def test_every_session_follows_the_cache(worker: Worker) -> None:
    log = worker.engine.cache_log
    log.stored(HASHES[0])
    sessions = [(await worker.session(), Router()) for _ in range(2)]

    async def until_known(wanted: set[BlockHash]) -> None:
        async with asyncio.timeout(30):
            for session, router in sessions:
                while router.known != wanted:
                    response = await session.call.read()
                    if response.HasField("cache"):
                        router.apply(response.cache)

    await until_known({HASHES[0]})
    log.stored(HASHES[1])
    log.removed(HASHES[0])
    await until_known({HASHES[1]})
    assert [router.resets for _, router in sessions] == [1, 1]
    sessions.append((await worker.session(), Router()))
    await until_known({HASHES[1]})


def test_an_engine_tells_of_what_it_computes_and_evicts(tmp_path: Path) -> None:
    block_bytes = 2 * 3 * 16 * 32 * 4
    with EngineUnderTest(tiny_llama(tmp_path / "llama"), kv_cache_bytes=9 * block_bytes, max_model_len=128) as engine:
        follower, router = CacheFollower(engine.engine.cache_log), Router()
        evicted = False
        for number in range(4):
            prompt = [(number * 37 + i * 11) % 500 + 3 for i in range(60)]
            engine.generate(str(number), prompt, max_tokens=8)
            before = set(router.known)
            router.catch_up(follower)
            evicted = evicted or not before <= router.known
            namespace = engine.engine.loaded.namespace
            chain = prefix_chain(request_namespace(namespace, b""), prompt, 16)
            assert set(chain) <= router.known
            assert router.known == engine.engine.blocks._by_hash.keys()
        assert evicted
        assert router.resets == 1
