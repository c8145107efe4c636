"""Named contexts: the shelf over a real node, its files, its gRPC calls and commands."""

from __future__ import annotations

import json
import random
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import grpc
import pytest

from tandem.kvstore.contexts import contexts
from tandem.kvstore.contexts.context_files import ContextFiles
from tandem.kvstore.contexts.contexts import MAX_TTL_S, ContextRefusedError, ContextShelf
from tandem.kvstore.eviction import Shares
from tandem.kvstore.identity import Namespace, prefix_chain
from tandem.kvstore.interfaces import ObjectKey, TierName
from tandem.kvstore.node import KvNode
from tandem.kvstore.process import admin
from tandem.proto import kvnode_pb2, kvnode_pb2_grpc
from tests.kvstore.node.fakes import Clock, DictTier, eventually, make_settings, put, spec_of
from tests.kvstore.store_node import CHUNK, StoreNode, arrive, hard_pins

ROOT = b"r" * 32
TOKENS = list(range(4 * CHUNK + 3))


def keys_of(tokens: list[int], root: bytes = ROOT) -> list[ObjectKey]:
    return [ObjectKey(key) for key in prefix_chain(Namespace(root), tokens, CHUNK)]


def noise(node: KvNode, count: int) -> None:
    """So many other objects."""
    chance = random.Random(1)
    for _ in range(count):
        put(node, replace(spec_of(0), key=ObjectKey(chance.randbytes(32))))


def here(node: KvNode, keys: list[ObjectKey]) -> list[bool]:
    return [bool(node.lookups.contains(key)) for key in keys]


@pytest.fixture
def make_node() -> Iterator[Callable[..., KvNode]]:
    nodes: list[KvNode] = []

    def make(num_objects: float = 16, tiers: tuple[DictTier, ...] = ()) -> KvNode:
        nodes.append(KvNode(make_settings(num_objects), tiers=tiers))
        nodes[-1].start()
        return nodes[-1]

    yield make
    for node in nodes:
        node.check_integrity()
        node.close()


@pytest.fixture
def node(make_node: Callable[..., KvNode]) -> KvNode:
    return make_node()


def shelf_of(node: KvNode, folder: Path | None = None, clock: Clock | None = None, key: bytes = b"") -> ContextShelf:
    files = ContextFiles(folder, key) if folder is not None else None
    return ContextShelf(node, files, CHUNK, clock or Clock())


def test_kv_of_a_context_stays_and_other_kv_leaves(node: KvNode) -> None:
    shelf = shelf_of(node)
    keys = keys_of(TOKENS)
    arrive(node, keys[:2])
    shelf.put("acme", "manual", TOKENS, root=ROOT, ttl_s=60)
    shelf.keep()
    arrive(node, keys[2:])  # later than the context
    shelf.keep()
    noise(node, 100)
    assert all(here(node, keys))
    residency = shelf.residency(shelf.list()[0])
    assert (residency.resident_tokens, residency.chunks) == (4 * CHUNK, {TierName.HOST: 4})
    assert shelf.drop("acme", "manual")
    assert hard_pins(node) == 0
    noise(node, 200)
    assert not any(here(node, keys))
    assert shelf.get("acme", "manual") is None
    assert not shelf.drop("acme", "manual")


def test_what_is_lost_is_pinned_when_it_comes_again(node: KvNode) -> None:
    shelf = shelf_of(node)
    context = shelf.put("acme", "manual", TOKENS, root=ROOT, ttl_s=60)
    keys = keys_of(TOKENS)
    arrive(node, keys)
    shelf.keep()
    node.commands.clear()
    assert shelf.residency(context).resident_tokens == 0
    arrive(node, keys[:1] + keys[2:])
    assert shelf.residency(context).resident_tokens == CHUNK  # what comes after a gap is of no use
    arrive(node, keys[1:2])
    shelf.keep()
    noise(node, 100)
    assert shelf.residency(context).resident_tokens == 4 * CHUNK


def test_a_context_expires_and_its_file_goes(node: KvNode, tmp_path: Path) -> None:
    clock = Clock()
    shelf = shelf_of(node, tmp_path, clock)
    shelf.put("acme", "manual", TOKENS, root=ROOT, ttl_s=60)
    arrive(node, keys_of(TOKENS))
    shelf.keep()
    clock.now += 61
    assert shelf.get("acme", "manual") is None
    assert shelf.list() == []
    assert not shelf.drop("acme", "manual")
    shelf.keep()
    assert hard_pins(node) == 0
    assert list(tmp_path.iterdir()) == []


def test_a_new_version_lets_go_of_what_only_the_old_one_had(node: KvNode) -> None:
    shelf = shelf_of(node)
    assert shelf.put("acme", "manual", TOKENS, root=ROOT, ttl_s=60).version == 1
    changed = TOKENS[: 2 * CHUNK] + [400] * (2 * CHUNK)
    arrive(node, keys_of(TOKENS) + keys_of(changed)[2:])
    shelf.keep()
    assert hard_pins(node) == 4
    assert shelf.put("acme", "manual", changed, root=ROOT, ttl_s=60).version == 2
    shelf.keep()
    assert hard_pins(node) == 4
    noise(node, 100)
    assert here(node, keys_of(TOKENS)) == [True, True, False, False]
    assert all(here(node, keys_of(changed)))
    with pytest.raises(ContextRefusedError, match="version 2 is there") as refused:
        shelf.put("acme", "manual", TOKENS, root=ROOT, ttl_s=60, version=2)
    assert refused.value.problem == "old_version"
    assert shelf.put("acme", "manual", changed, root=ROOT, ttl_s=90, version=2).version == 2  # a retry
    assert shelf.put("acme", "manual", TOKENS, root=ROOT, ttl_s=60, version=7).version == 7


def test_contexts_that_share_text_pin_it_each_for_itself(node: KvNode) -> None:
    shelf = shelf_of(node)
    arrive(node, keys_of(TOKENS))
    for name in ("one", "two"):
        shelf.put("acme", name, TOKENS, root=ROOT, ttl_s=60)
    shelf.keep()
    shelf.drop("acme", "one")
    noise(node, 100)
    assert all(here(node, keys_of(TOKENS)))


def test_names_of_owners_are_their_own(node: KvNode) -> None:
    shelf = shelf_of(node)
    shelf.put("acme", "manual", [1, 2], root=ROOT, ttl_s=60)
    shelf.put("bolt", "manual", [3], root=ROOT, ttl_s=60)
    found = shelf.get("bolt", "manual")
    assert found is not None
    assert found.token_ids == [3]
    assert [context.owner for context in shelf.list()] == ["acme", "bolt"]
    assert [context.token_ids for context in shelf.list("acme")] == [[1, 2]]
    assert shelf.drop("acme", "manual")
    assert shelf.get("bolt", "manual") is not None


@pytest.mark.parametrize("key", [b"", b"k" * 32])
def test_contexts_survive_a_restart_and_their_kv_is_pinned_where_it_is(
    make_node: Callable[..., KvNode], tmp_path: Path, key: bytes
) -> None:
    clock, disk = Clock(), DictTier()
    node = make_node(16, (disk,))
    shelf = shelf_of(node, tmp_path, clock, key)
    tokens = [65 + token for token in TOKENS]
    put_there = shelf.put("acme", "manual", tokens, root=ROOT, ttl_s=60)
    shelf.put("acme", "short", [1], root=ROOT, ttl_s=30)
    arrive(node, keys_of(tokens))
    assert node.flush(60)
    node.close()
    (tmp_path / "half.new").write_bytes(b"half")
    assert all((bytes([65, 0, 0, 0, 66]) in path.read_bytes()) <= (not key) for path in tmp_path.glob("*.context"))

    clock.now += 40
    node = make_node(16, (disk,))
    shelf = shelf_of(node, tmp_path, clock, key)
    assert shelf.list() == [put_there]
    assert len(list(tmp_path.iterdir())) == 1
    shelf.keep()
    assert [(tier.tier, tier.hard_pins) for tier in node.stats().tiers if tier.hard_pins] == [(TierName.DISK, 4)]
    assert shelf.residency(put_there).chunks == {TierName.DISK: 4}
    assert shelf.put("acme", "manual", [5], root=ROOT, ttl_s=60).version == 2


def test_another_chunk_size_keeps_the_recipe(node: KvNode, tmp_path: Path) -> None:
    clock = Clock()
    shelf_of(node, tmp_path, clock).put("acme", "manual", TOKENS, root=ROOT, ttl_s=60)
    (found,) = ContextShelf(node, ContextFiles(tmp_path), 2 * CHUNK, clock).list()
    assert (found.token_ids, found.chunk_tokens) == (TOKENS, 2 * CHUNK)


@pytest.mark.parametrize("key", [b"", b"k" * 32])
def test_damaged_files_are_skipped_and_the_others_kept(
    node: KvNode, tmp_path: Path, key: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    clock = Clock()
    shelf = shelf_of(node, tmp_path, clock, key)
    for number in range(8):
        shelf.put("acme", f"c{number}", TOKENS, root=ROOT, ttl_s=60)
    chance = random.Random(4)
    paths = sorted(tmp_path.iterdir())
    for number, path in enumerate(paths[:5]):
        whole = bytearray(path.read_bytes())
        if number < 3:
            whole[chance.randrange(len(whole))] ^= 1 << chance.randrange(8)
        path.write_bytes(whole if number < 3 else whole[: chance.randrange(len(whole))])
    paths[5].rename(paths[6])  # the content of one under the name of another
    again = shelf_of(node, tmp_path, clock, key)
    assert [context.token_ids for context in again.list()] == [TOKENS]
    assert caplog.text.count("is damaged") == 6
    if key:
        assert shelf_of(node, tmp_path, clock, b"x" * 32).list() == []


def test_a_context_that_cannot_be_written_is_refused_and_the_old_one_stays(node: KvNode, tmp_path: Path) -> None:
    folder = tmp_path / "contexts"
    shelf = shelf_of(node, folder)
    shelf.put("acme", "manual", TOKENS, root=ROOT, ttl_s=60)
    folder.rename(tmp_path / "elsewhere")
    folder.write_bytes(b"a file where the folder was")
    with pytest.raises(ContextRefusedError, match="written"):
        shelf.put("acme", "manual", [1], root=ROOT, ttl_s=60)
    (kept,) = shelf.list()
    assert kept.token_ids == TOKENS


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("name", ""),
        ("name", "a/b"),
        ("name", "x" * 65),
        ("owner", ""),
        ("token_ids", []),
        ("root", b"short"),
        ("ttl_s", 0.0),
        ("ttl_s", float("nan")),
        ("ttl_s", MAX_TTL_S + 1),
        ("ttl_s", 0.5),
        ("ttl_s", -1.0),
        ("ttl_s", float("inf")),
    ],
)
def test_wrong_fields_are_named(node: KvNode, field: str, value: object) -> None:
    fields: dict[str, object] = {"owner": "acme", "name": "m", "token_ids": [1], "root": ROOT, "ttl_s": 1.0}
    with pytest.raises(ContextRefusedError, match=f"^{field}") as refused:
        shelf_of(node).put(**fields | {field: value})  # type: ignore[arg-type]
    assert refused.value.problem == "invalid"


def test_count_and_bytes_are_bounded(node: KvNode, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contexts, "MAX_CONTEXTS", 3)
    monkeypatch.setattr(contexts, "MAX_BYTES", 40)
    clock = Clock()
    shares = Shares(owners={"acme": 0.99, "initech": 0.99})
    shelf = ContextShelf(node, None, CHUNK, clock, shares)
    for number, owner in enumerate(("initech", "acme", "initech")):
        shelf.put(owner, f"c{number}", [1], root=ROOT, ttl_s=60 + number)
    for owner, name, tokens in (("acme", "c3", [1]), ("initech", "c0", [1] * 9)):
        with pytest.raises(ContextRefusedError) as refused:
            shelf.put(owner, name, tokens, root=ROOT, ttl_s=60)
        assert refused.value.problem == "full"
    shelf.drop("acme", "c1")
    shelf.drop("initech", "c2")
    shelf.put("acme", "c1", [1], root=ROOT, ttl_s=60)
    shelf.put("initech", "c0", [1] * 8, root=ROOT, ttl_s=60)  # replaces one
    clock.now += 60
    assert shelf.put("acme", "c3", [1], root=ROOT, ttl_s=60).version == 1


def take_all(shelf: ContextShelf, owner: str, tokens: int = 1) -> int:
    """How many contexts of so many tokens an owner gets."""
    for number in range(contexts.MAX_CONTEXTS + 1):
        try:
            shelf.put(owner, f"c{number}", [1] * tokens, root=ROOT, ttl_s=60)
        except ContextRefusedError as error:
            refusal = error
            break
    assert refusal.problem == "invalid"
    assert str(refusal).startswith(f"name: {owner} holds {number} other contexts")
    return number


def test_whatever_an_owner_takes_others_find_room(node: KvNode, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contexts, "MAX_CONTEXTS", 64)
    shelf = shelf_of(node)
    assert [take_all(shelf, owner) for owner in ("greedy", "acme", "initech")] == [32, 16, 8]
    shelf.put("greedy", "c0", [1, 2], root=ROOT, ttl_s=60)  # a new version needs no place
    monkeypatch.setattr(contexts, "MAX_BYTES", 4 * 2000)
    by_size = shelf_of(node)
    assert [take_all(by_size, owner, 100) for owner in ("greedy", "acme", "initech")] == [10, 5, 2]


def test_an_owner_with_a_quota_has_that_share(node: KvNode, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contexts, "MAX_CONTEXTS", 40)
    shelf = ContextShelf(node, None, CHUNK, Clock(), Shares(everybody=0.1, owners={"acme": 0.25, "small": 0.001}))
    assert [take_all(shelf, owner) for owner in ("greedy", "acme", "small", "initech")] == [4, 10, 1, 4]


def test_a_round_has_a_bound_and_the_next_goes_on(node: KvNode, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contexts, "PINS_PER_ROUND", 3)
    shelf = shelf_of(node)
    arrive(node, keys_of(TOKENS) + keys_of(TOKENS[CHUNK:]))
    shelf.put("acme", "a", TOKENS, root=ROOT, ttl_s=60)
    shelf.put("acme", "b", TOKENS[CHUNK:], root=ROOT, ttl_s=60)
    pins = []
    for _ in range(3):
        shelf.keep()
        pins.append(hard_pins(node))
    assert pins == [3, 6, 7]


def test_threads_change_contexts_at_once_and_no_pin_is_left(node: KvNode) -> None:
    shelf = ContextShelf(node, None, CHUNK)
    shelf.start()
    arrive(node, keys_of(TOKENS))

    def change(seed: int) -> None:
        chance = random.Random(seed)
        for _ in range(150):
            name = f"c{chance.randrange(3)}"
            if chance.random() < 0.5:
                shelf.put("acme", name, TOKENS[: chance.choice((20, 40, 67))], root=ROOT, ttl_s=60)
            else:
                shelf.drop("acme", name)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(change, range(4)))
    for context in shelf.list():
        shelf.drop("acme", context.name)
    shelf.close()
    assert hard_pins(node) == 0
    assert not any(thread.name == "kv-contexts" for thread in threading.enumerate())


def test_service_and_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with StoreNode(tmp_path) as store, grpc.insecure_channel(store.address) as channel:
        check_service_and_commands(store, kvnode_pb2_grpc.KvNodeStub(channel), capsys)


def check_service_and_commands(
    store: StoreNode, stub: kvnode_pb2_grpc.KvNodeStub, capsys: pytest.CaptureFixture[str]
) -> None:
    node = store.node

    def kv(*arguments: str) -> tuple[int, str]:
        code = admin.main([*arguments, "--node", store.address])
        return code, capsys.readouterr().out

    request = kvnode_pb2.PutContextRequest(owner="acme", name="manual", token_ids=TOKENS, root=ROOT, ttl_s=60)
    assert stub.PutContext(request).context.version == 1
    arrive(node, keys_of(TOKENS)[:3])
    eventually(lambda: hard_pins(node) == 3)
    got = stub.GetContext(kvnode_pb2.GetContextRequest(owner="acme", name="manual", with_tokens=True)).context
    assert (list(got.token_ids), got.resident_tokens, got.num_tokens) == (TOKENS, 3 * CHUNK, len(TOKENS))
    for wrong, code in (
        ({"name": "a b"}, grpc.StatusCode.INVALID_ARGUMENT),
        ({"version": 1, "ttl_s": 60, "token_ids": [1]}, grpc.StatusCode.FAILED_PRECONDITION),
    ):
        changed = kvnode_pb2.PutContextRequest(**{"owner": "acme", "name": "manual", "root": ROOT} | wrong)
        with pytest.raises(grpc.RpcError) as failed:
            stub.PutContext(changed)
        assert failed.value.code() is code

    code, text = kv("contexts")
    assert code == 0
    assert "manual" in text
    assert kv("contexts", "--owner", "bolt") == (0, "no contexts\n")
    code, text = kv("context", "manual", "--owner", "acme", "--with-tokens")
    assert code == 0
    assert "host: 3 of 4 chunks" in text
    assert f"tokens: {TOKENS}" in text
    listed = json.loads(kv("contexts", "--json")[1])["contexts"]
    assert [(each["owner"], each["token_ids"], each["tiers"]) for each in listed] == [
        ("acme", [], [{"tier": "host", "chunks": 3}])
    ]
    assert kv("context", "manual")[0] == 1  # of another owner
    assert kv("drop-context", "manual", "--owner", "acme") == (0, "dropped\n")
    assert kv("drop-context", "manual", "--owner", "acme")[0] == 1
    assert hard_pins(node) == 0
