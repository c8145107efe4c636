"""The block manager against a slow, obvious model; and its rules one by one."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tandem.engine.request import RequestKey
from tandem.engine.schedule.block_manager import BlockManager, IntegrityError
from tandem.kvstore.identity import BlockHash, prefix_chain, request_namespace
from tests.engine_harness import ROOT

BLOCK = 4
OPERATIONS = ("allocate", "allocate", "extend", "publish", "free", "retain", "give back", "lend", "end a loan")


def chain_of(tokens: list[int], salt: bytes = b"") -> list[BlockHash]:
    return prefix_chain(request_namespace(ROOT, salt), tokens, BLOCK)


def key(name: object) -> RequestKey:
    return RequestKey(str(name), 0)


class ObviousModel:
    """Which request owns which blocks, and what each block is known to hold: nothing else is remembered."""

    def __init__(self, num_blocks: int) -> None:
        self.usable = num_blocks - 1
        self.tables: dict[RequestKey, list[int]] = {}
        self.prompt: dict[RequestKey, tuple[bytes, list[int]]] = {}
        self.content: dict[int, tuple[bytes, tuple[int, ...]]] = {}
        self.readers: list[list[int]] = []
        self.loans: list[list[int]] = []
        """With others than KV."""
        self.used_by: dict[int, set[bool]] = {}
        """Whether the last band, or another one, has used what is in a block."""

    def owned(self) -> set[int]:
        return {block for blocks in (*self.tables.values(), *self.readers, *self.loans) for block in blocks}

    def allocated(
        self, name: RequestKey, salt: bytes, tokens: list[int], cached: int, table: list[int], last_band: bool
    ) -> None:
        hits = cached // BLOCK
        assert cached % BLOCK == 0
        assert cached < len(tokens), "one token is left to compute"
        for index, block in enumerate(table[:hits]):
            assert self.content[block] == (salt, tuple(tokens[: (index + 1) * BLOCK])), "wrong content shared"
        resident = set(self.content.values())
        following = (salt, tuple(tokens[: (hits + 1) * BLOCK]))
        if (hits + 1) * BLOCK < len(tokens):
            assert following not in resident, "a longer hit was possible"
        for block in table[:hits]:
            self.used_by[block].add(last_band)
        self.fresh(table[hits:], last_band, kept=set(table[:hits]))
        self.tables[name] = list(table)
        self.prompt[name] = (salt, tokens)

    def fresh(self, blocks: list[int], last_band: bool, kept: set[int] = frozenset()) -> None:
        assert not set(blocks) & self.owned(), "a block in use was handed out"
        assert 0 not in blocks
        evictable = self.content.keys() - self.owned() - kept - set(blocks)
        if any(block in self.content and self.used_by[block] != {True} for block in blocks):
            assert not any(self.used_by[block] == {True} for block in evictable), "the last band's go first"
        for block in blocks:
            self.content.pop(block, None)
            self.used_by[block] = {last_band}

    def published(self, name: RequestKey, count: int) -> None:
        salt, tokens = self.prompt[name]
        for index in range(count):
            content = (salt, tuple(tokens[: (index + 1) * BLOCK]))
            if content not in self.content.values():
                self.content[self.tables[name][index]] = content


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32), num_blocks=st.integers(2, 24))
def test_random_operations_agree_with_the_obvious_model(seed: int, num_blocks: int) -> None:
    rng = random.Random(seed)
    least = rng.randint(0, num_blocks - 1)
    blocks, model = BlockManager(num_blocks, BLOCK, longest_request=least * BLOCK), ObviousModel(num_blocks)
    for step in range(120):
        operation = rng.choice(OPERATIONS)
        if operation == "allocate":
            tokens = [rng.randrange(2) for _ in range(rng.randint(1, 22))]
            salt = rng.choice((b"", b"tenant"))
            before, last_band = model.owned(), rng.random() < 0.5
            cached = blocks.allocate(key(step), len(tokens), chain_of(tokens, salt), last_band=last_band)
            if cached is None:
                hits = blocks.cached_prefix(chain_of(tokens, salt), len(tokens))
                reused = {
                    block
                    for block, content in model.content.items()
                    if content in {(salt, tuple(tokens[: (i + 1) * BLOCK])) for i in range(hits)}
                }
                assert -(-len(tokens) // BLOCK) - len(reused & before) > model.usable - len(before)
                assert not blocks.holds(key(step))
            else:
                model.allocated(key(step), salt, tokens, cached, list(blocks.table(key(step))), last_band)
        elif operation == "lend":
            count = rng.randint(1, num_blocks)
            possible = count <= model.usable - len(model.owned()) and count <= blocks.usable_blocks - least
            lent = blocks.budget.lend(count)
            assert (lent is not None) == possible
            if lent is not None:
                assert len(set(lent)) == count
                model.fresh(list(lent), last_band=False)
                model.loans.append(list(lent))
        elif operation == "end a loan":
            if model.loans:
                blocks.budget.give_back(model.loans.pop(rng.randrange(len(model.loans))))
        elif operation == "give back":
            if model.readers:
                blocks.give_back(model.readers.pop(rng.randrange(len(model.readers))))
        elif model.tables:
            name = rng.choice(sorted(model.tables))
            if operation == "extend":
                wanted = len(model.tables[name]) * BLOCK + rng.randint(0, 9)
                needed = -(-wanted // BLOCK) - len(model.tables[name])
                possible = needed <= model.usable - len(model.owned())
                last_band = rng.random() < 0.5
                assert blocks.extend(name, wanted, last_band) == possible
                if possible:
                    old = len(model.tables[name])
                    model.fresh(list(blocks.table(name)[old:]), last_band)
                    model.tables[name] = list(blocks.table(name))
                assert blocks.table(name) == model.tables[name]
            elif operation == "publish":
                salt, tokens = model.prompt[name]
                count = rng.randint(0, len(tokens) // BLOCK)
                for index, block_hash in enumerate(chain_of(tokens, salt)[:count]):
                    blocks.publish(name, index, block_hash)
                model.published(name, count)
            elif operation == "retain":
                first = rng.randrange(len(model.tables[name]))
                count = rng.randint(1, len(model.tables[name]) - first)
                retained = blocks.retain(name, first, count)
                assert retained == model.tables[name][first : first + count]
                model.readers.append(retained)
            else:
                blocks.free(name)
                del model.tables[name]
        blocks.check_integrity()
        assert blocks.available_blocks == model.usable - len(model.owned())
        assert blocks.usable_blocks == model.usable - sum(map(len, model.loans)) >= least
        assert blocks.num_retained == sum(map(len, model.readers))
    for name in sorted(model.tables):
        blocks.free(name)
    for reader in model.readers:
        blocks.give_back(reader)
    for loan in model.loans:
        blocks.budget.give_back(loan)
    blocks.check_integrity()
    assert blocks.available_blocks == blocks.usable_blocks


def filled(blocks: BlockManager, name: str, tokens: list[int], salt: bytes = b"") -> None:
    """Computes and publishes `tokens`, then lets them go."""
    assert blocks.allocate(key(name), len(tokens), chain_of(tokens, salt)) is not None
    for index, block_hash in enumerate(chain_of(tokens, salt)):
        blocks.publish(key(name), index, block_hash)
    blocks.free(key(name))


def test_a_full_hit_leaves_one_token_to_compute() -> None:
    blocks = BlockManager(10, BLOCK)
    prompt = list(range(8))
    filled(blocks, "a", prompt)
    assert blocks.allocate(key("b"), 8, chain_of(prompt)) == 4
    assert blocks.allocate(key("c"), 9, chain_of([*prompt, 8])) == 8


def test_another_salt_never_hits() -> None:
    blocks = BlockManager(10, BLOCK)
    prompt = list(range(9))
    filled(blocks, "a", prompt, salt=b"one")
    assert blocks.allocate(key("b"), 9, chain_of(prompt, b"two")) == 0


def test_unpublished_blocks_are_not_shared() -> None:
    blocks = BlockManager(10, BLOCK)
    prompt = list(range(9))
    blocks.allocate(key("a"), 9, chain_of(prompt))
    assert blocks.allocate(key("b"), 9, chain_of(prompt)) == 0


def test_the_least_recently_used_tail_is_evicted_first() -> None:
    blocks = BlockManager(7, BLOCK)
    old, new = [1] * 9, [2] * 9
    filled(blocks, "old", old)
    filled(blocks, "new", new)
    # Four blocks are cached and two free; a request of three blocks evicts one: the second of `old`.
    assert blocks.allocate(key("x"), 12, chain_of([3] * 12)) == 0
    assert blocks.cached_prefix(chain_of(old), 9) == 1
    assert blocks.cached_prefix(chain_of(new), 9) == 2


def test_what_only_the_last_band_has_used_is_evicted_before_what_clients_will_ask_for_again() -> None:
    blocks = BlockManager(13, BLOCK)
    shared, client = [1] * 9, [2] * 9
    filled(blocks, "client", client)
    filled(blocks, "shared", shared)
    for index in range(20):
        batch = [3 + index] * 13
        hits = blocks.allocate(key(index), 13, chain_of(batch), last_band=True)
        assert hits == 0
        for place, block_hash in enumerate(chain_of(batch)):
            blocks.publish(key(index), place, block_hash)
        blocks.free(key(index))
    assert blocks.allocate(key("batch"), 9, chain_of(shared), last_band=True) == 8, "it may use what is there"
    blocks.free(key("batch"))
    for tokens in (client, shared):
        assert blocks.cached_prefix(chain_of(tokens), 9) == 2


def test_fresh_blocks_are_neighbours() -> None:
    blocks = BlockManager(20, BLOCK)
    for name in "abc":
        blocks.allocate(key(name), 16, [])
    blocks.free(key("b"))
    blocks.allocate(key("d"), 16, [])
    assert blocks.table(key("d")) == [5, 6, 7, 8]


def test_the_reserve_stays_available() -> None:
    blocks = BlockManager(6, BLOCK)
    assert blocks.allocate(key("a"), 16, [], reserve=2) is None
    assert blocks.allocate(key("a"), 12, [], reserve=2) == 0


def test_a_cached_block_that_is_needed_for_the_hit_is_not_counted_as_free() -> None:
    blocks = BlockManager(4, BLOCK)
    prompt = list(range(9))
    filled(blocks, "a", prompt)
    assert blocks.allocate(key("b"), 13, chain_of([*prompt, 9, 10, 11, 12])) is None
    blocks.check_integrity()
    assert blocks.allocate(key("b"), 9, chain_of(prompt)) == 8


def test_without_caching_nothing_hits() -> None:
    blocks = BlockManager(10, BLOCK, enable_prefix_caching=False)
    filled(blocks, "a", list(range(9)))
    assert blocks.cached_prefix(chain_of(list(range(9))), 9) == 0


def test_a_second_table_is_refused() -> None:
    blocks = BlockManager(10, BLOCK)
    blocks.allocate(key("a"), 4, [])
    with pytest.raises(ValueError, match="has blocks already"):
        blocks.allocate(key("a"), 4, [])


def test_retained_blocks_outlive_their_request_and_stay_unshared() -> None:
    blocks = BlockManager(5, BLOCK)
    blocks.allocate(key("a"), 3 * BLOCK, [])
    retained = blocks.retain(key("a"), 1, 2)
    blocks.free(key("a"))
    blocks.check_integrity()
    assert blocks.available_blocks == 2
    assert blocks.allocate(key("b"), 3 * BLOCK, []) is None
    blocks.give_back(retained)
    assert blocks.available_blocks == 4
    with pytest.raises(ValueError, match="not retained"):
        blocks.give_back(retained)
    blocks.allocate(key("b"), BLOCK, [])
    with pytest.raises(ValueError, match="has 1 blocks, not 3"):
        blocks.retain(key("b"), 1, 2)
    blocks.check_integrity()


@pytest.mark.parametrize(
    ("damage", "finding"),
    [
        (lambda b: b._refs.__setitem__(1, 2), "counts 2"),
        (lambda b: b.budget._free.append(1), "free and owned"),
        (lambda b: b.budget._free.pop(), "lost"),
        (lambda b: b.budget._lent.add(1), "owned and lent"),
        (lambda b: b._tables[key("a")].append(1), "twice"),
        (lambda b: b._hash_of.__setitem__(1, BlockHash(b"x")), "hash index"),
        (lambda b: b._retained.__setitem__(1, 1), "owners and readers"),
        (lambda b: setattr(b, "num_retained", 3), "counted wrongly"),
    ],
)
def test_damage_is_found(damage, finding) -> None:  # type: ignore[no-untyped-def]
    blocks = BlockManager(6, BLOCK)
    blocks.allocate(key("a"), 4, [])
    blocks.check_integrity()
    damage(blocks)
    with pytest.raises(IntegrityError, match=finding):
        blocks.check_integrity()
