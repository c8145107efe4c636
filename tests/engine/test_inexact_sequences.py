"""What the scheduler does with a sequence some of whose KV is not exact."""

from __future__ import annotations

import pytest

from tandem.engine.schedule.block_manager import IntegrityError
from tandem.engine.schedule.ranges import TokenRanges
from tandem.engine.schedule.sequence import Phase, Sequence
from tests.engine.schedule.test_scheduler import BLOCK, Play


def loaded(play: Play, name: str, length: int, inexact_from: int | None) -> Sequence:
    """Its first 48 tokens came from the store."""
    sequence = play.add(name, 0, tokens=list(range(3, 3 + length)), max_tokens=60, look_up=True)
    sequence.stored = TokenRanges.up_to(48)
    play.scheduler.looked_up(sequence)
    play.scheduler.schedule(0.0)
    assert sequence.phase is Phase.LOADING
    play.scheduler.join(sequence, TokenRanges.up_to(48), inexact_from=inexact_from)
    play.scheduler.publish(sequence)
    return sequence


def cached(play: Play, sequence: Sequence) -> int:
    return play.blocks.cached_prefix(sequence.chain, len(sequence.tokens)) * BLOCK


@pytest.mark.parametrize(
    ("inexact_from", "exact"), [(0, 0), (15, 0), (16, 16), (40, 32), (48, 48), (None, 48)], ids=str
)
def test_a_block_with_one_inexact_row_is_not_cached(inexact_from: int | None, exact: int) -> None:
    play = Play()
    sequence = loaded(play, "a", 60, inexact_from)
    assert cached(play, sequence) == exact
    for _ in range(40):
        play.step()
    assert cached(play, sequence) == (exact if inexact_from is not None else 96), "what is computed after it neither"
    assert len(play.blocks.cache_log.snapshot()[1]) == cached(play, sequence) // BLOCK


def test_what_is_computed_again_after_a_preemption_is_exact() -> None:
    play = Play(num_blocks=9)
    sequence = loaded(play, "a", 60, 16)
    first = play.add("first", 40, max_tokens=60, priority=-1)
    while sequence.phase is Phase.RUNNING:
        play.step()
    assert sequence.phase is Phase.WAITING
    assert sequence.inexact_from is None
    play.scheduler.finish(first)
    play.step()
    assert sequence.phase is Phase.RUNNING
    assert cached(play, sequence) >= 48


def test_an_equal_prompt_does_not_wait_for_blocks_that_will_not_be_cached() -> None:
    play = Play()
    sequence = loaded(play, "a", 60, 16)
    twin = play.add("twin", 0, tokens=list(sequence.tokens[:50]), look_up=True)
    play.scheduler.looked_up(twin)
    plan = play.step()
    assert [chunk.sequence for chunk in plan.chunks] == [sequence, twin]


def test_the_books_notice_a_block_that_was_published_too_soon() -> None:
    play = Play()
    sequence = loaded(play, "a", 60, None)
    sequence.inexact_from = 16
    with pytest.raises(IntegrityError, match="published more than the 16 tokens that are exact"):
        play.scheduler.check_integrity()
