"""From sessions to placements: what the workers say, and what the router counts itself."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import cast

import pytest

from tandem.common.fairness import LAST_BAND
from tandem.common.sampling import SamplingParams
from tandem.kvstore.identity import BlockHash, Namespace, keyed_salt, prefix_chain, request_namespace
from tandem.kvstore.interfaces import Location, ObjectKey, TierName
from tandem.proto import worker_pb2
from tandem.router.fleet.session import Call, WorkerSession
from tandem.router.fleet.workers import Fleet
from tandem.router.metrics.router_metrics import RouterMetrics
from tandem.router.placing.dispatch import Dispatcher, SequenceSpec
from tandem.router.placing.store_view import StoreView
from tandem.router.tenants.caller import Caller
from tandem.router.text.served_model import Prompt

NAMESPACE = Namespace(b"n" * 32)
CALLER = Caller("acme")
SALT_KEY = b"s" * 32
ROOT = request_namespace(NAMESPACE, keyed_salt(SALT_KEY, CALLER.cache_salt("")))


def session(name: str, **fields: object) -> WorkerSession:
    info = worker_pb2.WorkerInfo(
        worker_id=name,
        worker_epoch=1,
        namespace=NAMESPACE,
        block_size=16,
        num_blocks=4096,
        max_num_seqs=4,
        hardware_class="nvidia-h100",
        num_parameters=8 * 10**9,
        sends_cache_events=True,
    )
    for field, value in fields.items():
        setattr(info, field, value)
    return WorkerSession(info, cast(Call, None))


class Workers:
    def __init__(self, decode: Sequence[WorkerSession], prefill: Sequence[WorkerSession] = ()) -> None:
        self.decode, self.prefill = list(decode), list(prefill)


class Listener:
    def on_output(self, output: worker_pb2.RequestOutput) -> None: ...
    def on_worker_lost(self, reason: str) -> None: ...


class Bench:
    def __init__(self, workers: Workers, store: StoreView | None = None, salt_key: bytes = SALT_KEY) -> None:
        self.dispatcher = Dispatcher(cast(Fleet, workers), RouterMetrics(), "auto", store, salt_key)
        self.sent = 0

    def start(  # type: ignore[no-untyped-def]
        self, tokens: Sequence[int], output: Sequence[int] = (), caller: Caller = CALLER, priority: int = 0
    ):
        self.sent += 1
        key = worker_pb2.RequestKey(request_id=f"r{self.sent}", epoch=1)
        spec = replace(sequence(tokens, caller), priority=priority)
        return self.dispatcher.start(key, spec, Listener(), timeout_s=10, output_token_ids=output)

    def loads(self):  # type: ignore[no-untyped-def]
        return [self.dispatcher.pool.state(worker).load for worker in self.dispatcher.fleet.decode]


def sequence(tokens: Sequence[int], caller: Caller = CALLER) -> SequenceSpec:
    return SequenceSpec(Prompt(list(tokens)), SamplingParams(max_tokens=32), caller)


def blocks(tokens: Sequence[int]) -> bytes:
    return b"".join(prefix_chain(ROOT, tokens, 16))


def tell(worker: WorkerSession, **fields: object) -> None:
    worker._dispatch(worker_pb2.SessionResponse(**fields))  # type: ignore[arg-type]


def answer(worker: WorkerSession, key: worker_pb2.RequestKey, tokens: int, **fields: object) -> None:
    tell(worker, outputs=[worker_pb2.RequestOutput(key=key, token_ids=[5] * tokens, **fields)])  # type: ignore[arg-type]


@pytest.fixture(autouse=True)
async def in_a_loop() -> None:
    """Sessions make events of the running loop."""
    asyncio.get_running_loop()


@pytest.mark.parametrize("before", [True, False])
async def test_cache_events_draw_a_prompt_to_its_blocks(before: bool) -> None:
    """Also those that came before anybody wanted to know."""
    workers = [session(f"w{i}") for i in range(4)]
    tokens = list(range(2048))
    bench = Bench(Workers(workers))
    if not before:
        assert bench.dispatcher.room(100, 0)  # looks at every worker
        bench.loads()
    tell(workers[2], cache=worker_pb2.CacheEvents(reset=True, stored=blocks(tokens)))
    assert bench.loads()
    assert bench.dispatcher.cached_tokens(sequence(tokens)) == 2048
    assert bench.start([*tokens, 1]).decode is workers[2]
    tell(workers[2], cache=worker_pb2.CacheEvents(removed=blocks(tokens)[32 * 64 :]))
    bench.dispatcher.pool.index.check_integrity()
    tell(workers[2], cache=worker_pb2.CacheEvents(reset=True))
    assert bench.dispatcher.cached_tokens(sequence(list(range(100)))) in (0, 96), "only what is promised is left"


async def test_a_request_is_counted_from_its_start_to_its_end() -> None:
    workers = [session("w0"), session("w1", sends_cache_events=False)]
    bench = Bench(Workers(workers))
    attempts = [bench.start(range(100 * i, 100 * i + 64)) for i in range(1, 9)]
    assert [load.requests for load in bench.loads()] == [4, 4]
    assert bench.dispatcher.wait_s(0) > 0.0
    report = worker_pb2.PromptReport(cached_tokens=0, prefill_s=0.5)
    for attempt in attempts[:6]:
        answer(attempt.decode, attempt.key, 1, prompt=report)
    assert sum(load.decoding for load in bench.loads()) == 6
    answer(attempts[0].decode, attempts[0].key, 1, finish_reason=worker_pb2.FINISH_REASON_STOP)
    for attempt in attempts:
        attempt.cancel()
        attempt.cancel()
    for load in bench.loads():
        assert (load.requests, load.waiting, load.decoding, load.kv_tokens, load.reserved_tokens) == (0, 0, 0, 0, 0)
    assert bench.dispatcher.wait_s(0) == 0.0
    assert bench.loads()[0].model.prefill_s(64) > 0.05, "it has learned from the reports"
    bench.dispatcher.pool.index.check_integrity()


async def test_room_ends_where_batches_are_full_and_where_prompts_queue() -> None:
    worker = session("w0")
    bench = Bench(Workers([worker]))
    assert bench.dispatcher.room(100, 0)
    for _ in range(6):
        bench.start(range(32))
    assert not bench.dispatcher.room(100, 0)
    other = Bench(Workers([session("w1", max_num_seqs=1000, hardware_class="cpu")]))
    other.start(range(4000))
    assert other.dispatcher.wait_s(0) > 0.25
    assert not other.dispatcher.room(100, 0)
    assert not Bench(Workers([])).dispatcher.room(100, 0), "nobody is there: it waits"


async def test_who_sends_few_has_a_claim_on_the_slots_of_who_has_them_all() -> None:
    bench = Bench(Workers([session("w0")]))
    for _ in range(6):
        bench.start(range(32))
    assert not bench.dispatcher.room(100, 0)
    assert bench.dispatcher.claims("another", 1.0, 0)
    assert not bench.dispatcher.claims(CALLER.tenant, 1.0, 0)
    assert not bench.dispatcher.claims("another", 1.0, LAST_BAND)
    for _ in range(2):
        bench.start(range(32), caller=Caller("another"))
    assert not bench.dispatcher.claims("another", 1.0, 0), "it has its share"


async def test_the_work_of_other_routers_counts_from_the_status() -> None:
    workers = [session("w0"), session("w1")]
    bench = Bench(Workers(workers))
    status = worker_pb2.WorkerStatus(
        running=30, decoding=30, free_blocks=1000, total_blocks=4096, pending_prefill_tokens=50_000
    )
    tell(workers[0], status=status)
    assert {bench.start(range(1000 * i, 1000 * i + 100)).decode.name for i in range(3)} == {"w1"}


async def test_a_lost_worker_leaves_nothing_behind() -> None:
    worker = session("w0")
    bench = Bench(Workers([worker]))
    bench.start(range(64))
    state = bench.dispatcher.pool.state(worker)
    slot = state.load.slot
    assert bench.dispatcher.pool.index.match([BlockHash(blocks(range(64))[:32])]) == [(slot, 0, 1)]
    state.on_closed()
    assert bench.dispatcher.pool.index.match([BlockHash(blocks(range(64))[:32])]) == []


async def test_a_handover_promises_on_the_prefill_worker_alone() -> None:
    decode, prefill = session("d"), session("p")
    tell(decode, status=worker_pb2.WorkerStatus(running=60, decoding=60, free_blocks=4096, total_blocks=4096))
    bench = Bench(Workers([decode], [prefill]))
    attempts = [bench.start(range(4000)) for _ in range(2)]
    assert [attempt.prefill for attempt in attempts] == [prefill, prefill]
    found = bench.dispatcher.pool.index.match(prefix_chain(ROOT, range(4000), 16))
    assert [(slot, promised) for slot, _, promised in found] == [(bench.dispatcher.pool.state(prefill).load.slot, 250)]
    answer(prefill, attempts[0].key, 0, finish_reason=worker_pb2.FINISH_REASON_HANDED_OVER)
    assert bench.dispatcher.pool.state(prefill).load.requests == 1
    assert attempts[0].placement.reason == "handover"


class Directory:
    def __init__(self, locations: dict[ObjectKey, tuple[Location, ...]]) -> None:
        self.locations = locations

    def __len__(self) -> int:
        return len(self.locations)

    def lookup(self, keys: Sequence[ObjectKey]) -> list[tuple[Location, ...]]:
        return [self.locations.get(key, ()) for key in keys]

    def close(self) -> None: ...


def at(*places: tuple[str, TierName]) -> tuple[Location, ...]:
    return tuple(Location(node, 1, tier, 1000) for node, tier in places)


def test_what_each_home_node_can_fetch() -> None:
    keys = [ObjectKey(b"%d" % i) for i in range(6)]
    held = {
        keys[0]: at(("a", TierName.HOST), ("b", TierName.HOST)),
        keys[1]: at(("a", TierName.DISK), ("c", TierName.REMOTE)),
        keys[2]: at(("c", TierName.REMOTE)),
        keys[4]: at(("a", TierName.HOST)),
    }
    view = StoreView(Directory(held))
    assert view.reach(keys, 256, ["a", "b"]) == {
        "a": [("host", 256), ("disk", 512), ("remote", 768)],
        "b": [("host", 256), ("peer", 512), ("remote", 768)],
    }
    assert view.reach(keys[3:], 256, ["a"]) == {}


async def test_the_store_draws_a_prompt_to_the_worker_that_has_it_near() -> None:
    tokens = list(range(8192))
    keys = [ObjectKey(key) for key in prefix_chain(ROOT, tokens, 256)]
    held = {key: at(("near", TierName.HOST)) for key in keys}
    workers = [session(name, store_node=name, chunk_tokens=256) for name in ("far", "near")]
    for worker in workers:
        worker.info.kv_bytes_per_token = 131_072
    bench = Bench(Workers(workers), StoreView(Directory(held)))
    attempt = bench.start(tokens)
    assert attempt.decode.name == "near"
    assert attempt.placement.candidates[0].stored_tokens == (("host", 8191),)


async def test_a_workers_salts_cannot_be_computed_from_names() -> None:
    def salt(caller: Caller, salt_key: bytes = SALT_KEY) -> bytes:
        worker = session("w0")
        Bench(Workers([worker]), salt_key=salt_key).start(range(32), caller=caller)
        return bytes(worker._outbox[-1].submit.cache_salt)

    ours, theirs = Caller("acme", "readers"), Caller("initech", "readers")
    assert salt(CALLER) == salt(CALLER)
    assert salt(CALLER) != salt(CALLER, b"another deployment's key"[:24] + bytes(8))
    assert b"acme" not in salt(CALLER)
    assert salt(CALLER) not in (CALLER.cache_salt(""), salt(ours), salt(Caller("initech")), salt(Caller("readers")))
    assert salt(ours) == salt(theirs), "a sharing group is one"


async def test_batches_leave_a_worker_to_clients() -> None:
    workers = [session(f"w{index}") for index in range(3)]
    bench = Bench(Workers(workers))
    taken = [bench.start(range(100 * i, 100 * i + 64), priority=LAST_BAND) for i in range(1, 7)]
    (left,) = set(map(id, workers)) - {id(attempt.decode) for attempt in taken}
    assert id(bench.start(range(64)).decode) == left
    assert bench.dispatcher.room(64, 0)
    assert bench.dispatcher.room(64, LAST_BAND)
    for index in range(7, 13):
        bench.start(range(100 * index, 100 * index + 64), priority=LAST_BAND)
    assert not bench.dispatcher.room(64, LAST_BAND), "the free one is not theirs"


async def test_batches_do_without_the_only_prefill_worker() -> None:
    decode, prefill = session("d"), session("p", role=worker_pb2.ROLE_PREFILL)
    bench = Bench(Workers([decode], [prefill]))
    attempt = bench.start(range(4000), priority=LAST_BAND)
    assert (attempt.prefill, attempt.placement.reason) == (None, "left_free")
    bench.dispatcher._disaggregate = "always"
    assert bench.start(range(4000), priority=LAST_BAND).prefill is prefill


async def test_a_batch_is_served_where_only_the_free_worker_is_left() -> None:
    workers = [session("w0"), session("w1")]
    bench = Bench(Workers(workers))
    first = bench.start(range(64), priority=LAST_BAND)
    lost = first.decode
    bench.dispatcher.fleet.decode.remove(lost)
    assert bench.start(range(64), priority=LAST_BAND).decode is not lost


def hold_up(worker: WorkerSession) -> None:
    """So many decode there that computing a prompt elsewhere pays."""
    tell(worker, status=worker_pb2.WorkerStatus(running=60, decoding=60, free_blocks=4096, total_blocks=4096))


def finish(worker: WorkerSession, key: worker_pb2.RequestKey, **report: object) -> None:
    answer(worker, key, 1, prompt=worker_pb2.PromptReport(**report), finish_reason=worker_pb2.FINISH_REASON_STOP)  # type: ignore[arg-type]


async def test_a_slow_link_is_left_alone_once_it_is_known_and_tried_by_one_when_it_may_be_repaired(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = 1000.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    decode, prefill = session("d0", host_id="b"), session("p0", host_id="a")
    hold_up(decode)
    bench = Bench(Workers([decode], [prefill]))
    load = bench.loads()[0]

    def send(first_token: int) -> tuple[worker_pb2.RequestKey, bool]:
        attempt = bench.start(range(first_token, first_token + 2000))
        return attempt.key, attempt.prefill is not None

    key, handed_over = send(0)
    assert handed_over
    finish(decode, key, prefill_s=0.05, handover_s=20.0, computed_by="p0")
    assert not send(10_000)[1]
    assert load.model.handover_s(2000, ("a", "b"), now) == pytest.approx(20.0, rel=0.1)
    now += 3600.0
    key, handed_over = send(20_000)
    assert handed_over
    assert not send(30_000)[1], "one is enough to find out"
    finish(decode, key, prefill_s=0.05, handover_s=0.01, computed_by="p0")
    assert send(40_000)[1], "it was repaired"


@pytest.mark.parametrize(
    ("reason", "learned"), [("slow: not there", True), ("lease: silent", True), ("aborted: ended", False)]
)
async def test_a_hand_over_that_the_link_failed_teaches_what_it_cost(reason: str, learned: bool) -> None:
    decode, prefill = session("d0", host_id="b"), session("p0", host_id="a")
    hold_up(decode)
    bench = Bench(Workers([decode], [prefill]))
    load = bench.loads()[0]
    attempt = bench.start(range(2000))
    assert attempt.prefill is prefill
    finish(decode, attempt.key, handover_s=3.0, recompute_reason=reason, computed_by="d0")
    assert (load.model.handover_s(2000, ("a", "b"), time.monotonic()) > 2.0) == learned


@pytest.mark.parametrize(("hosts", "limited"), [(("a", "b"), True), (("a", "a"), False)])
async def test_only_between_hosts_a_hand_over_is_given_up_when_it_takes_too_long(
    hosts: tuple[str, str], limited: bool
) -> None:
    prefill, decode = session("p0", host_id=hosts[0]), session("d0", host_id=hosts[1])
    hold_up(decode)
    Bench(Workers([decode], [prefill])).start(range(2000))
    (sent,) = prefill._outbox
    assert (sent.submit.handover_limit_s > 0.0) == limited


async def test_the_index_is_as_large_as_what_the_workers_hold_under_its_bound() -> None:
    workers = [session(f"w{number}", num_blocks=100_000) for number in range(3)]
    fleet = cast(Fleet, Workers(workers))
    dispatcher = Dispatcher(fleet, RouterMetrics(), "auto", max_index_blocks=500_000)
    sizes = [dispatcher.pool.index.max_blocks]
    for worker in workers:
        state = dispatcher.pool.state(worker)
        sizes.append(dispatcher.pool.index.max_blocks)
    assert sizes == [65_536, 200_000, 400_000, 500_000]
    state.on_closed()
    tell(workers[0], cache=worker_pb2.CacheEvents(stored=blocks(range(2048))))
    tell(workers[0], cache=worker_pb2.CacheEvents(stored=blocks(range(3, 2048))))
    assert dispatcher.pool.index.max_blocks == 400_000
