"""Blocks for others than KV: the cache gives way, sequences do not, and KV keeps what its longest request needs."""

from __future__ import annotations

import pytest

from tandem.engine.schedule.block_manager import BlockManager
from tests.engine.schedule.test_block_manager import BLOCK, chain_of, filled, key
from tests.engine.schedule.test_scheduler import Play


def test_a_loan_takes_free_blocks_then_what_is_cached_and_never_what_a_request_has() -> None:
    blocks = BlockManager(9, BLOCK)
    filled(blocks, "cached", list(range(3 * BLOCK)))
    blocks.allocate(key("owner"), 2 * BLOCK, [])
    lent = blocks.budget.lend(5)
    assert lent is not None
    assert not set(lent) & set(blocks.table(key("owner")))
    assert blocks.cached_prefix(chain_of(list(range(3 * BLOCK + 1))), 3 * BLOCK + 1) == 1, "the tail of the cache went"
    assert blocks.budget.lend(2) is None, "one block is left"
    assert blocks.available_blocks == 1
    blocks.budget.give_back(lent[:2])
    assert (blocks.available_blocks, blocks.usable_blocks) == (3, 5)
    blocks.check_integrity()


def test_only_what_was_lent_is_taken_back() -> None:
    blocks = BlockManager(9, BLOCK)
    lent = blocks.budget.lend(2)
    assert lent is not None
    blocks.budget.give_back(lent)
    for strange in (lent, [0]):
        with pytest.raises(ValueError, match="are not lent"):
            blocks.budget.give_back(strange)
    blocks.check_integrity()


def test_the_longest_request_comes_to_its_end_whatever_others_took() -> None:
    play = Play(num_blocks=20, longest_request=10 * 16)
    lent = play.blocks.budget.lend(9)
    assert lent is not None
    assert play.blocks.budget.lend(1) is None
    for name in ("a", "b"):
        play.add(name, 100, max_tokens=60)
    play.run()
    assert play.emitted == {"a": 60, "b": 60}
    play.blocks.budget.give_back(lent)
    assert play.blocks.available_blocks == play.blocks.usable_blocks == 19
