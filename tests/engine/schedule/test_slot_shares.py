"""One tenant's long answers in every slot: another's requests come in all the same, and the first keeps its share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tandem.common.fairness import LAST_BAND
from tandem.common.slot_shares import LARGE, SHARE, kept
from tandem.engine.request import Preemption
from tandem.engine.schedule.admission import MAX_DISPLACED
from tandem.engine.schedule.sequence import Phase, Sequence
from tandem.engine.schedule.slot_shares import KEPT_S, KEPT_SHARE, SlotShares
from tests.engine.schedule.test_fair_scheduling import Floor
from tests.engine_harness import EngineUnderTest, make_sequence, tiny_llama, wait_for

SLOTS = 16
LONG = 10_000


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("model"))


class Crowd(Floor):
    """A floor with a clock, whose slots one tenant has filled."""

    def __init__(self, slots: int = SLOTS, num_blocks: int = 4000, **options: Any) -> None:
        super().__init__(slots, num_blocks)
        self.now = 0.0
        self.crowd = [self.add("hog", max_tokens=LONG, **options) for _ in range(2 * slots)]
        self.step()
        assert running(self.crowd) == slots

    def step(self, seconds: float = 0.01) -> Any:
        self.now += seconds
        plan = super().step(self.now)
        assert not {each.key for each in plan.preempted} & {each.key for each in plan.admitted}
        assert running(self.crowd) <= SLOTS
        return plan

    def leave(self, *sequences: Sequence) -> None:
        for sequence in sequences:
            if sequence.phase is not Phase.FINISHED:
                self.scheduler.finish(sequence)


def running(sequences: list[Sequence]) -> int:
    return sum(sequence.phase is Phase.RUNNING for sequence in sequences)


def test_a_newcomer_takes_the_last_slot_of_a_tenant_that_has_all() -> None:
    floor = Crowd()
    newcomer = floor.add("victim", max_tokens=3)
    plan = floor.step()
    assert plan.admitted == [newcomer]
    assert [each.preempted for each in plan.preempted] == [Preemption.PRIORITY]
    assert plan.preempted == [floor.crowd[SLOTS - 1]], "the one that came last"
    assert newcomer.num_output == 1


def test_what_is_displaced_goes_on_where_it_was() -> None:
    floor = Crowd()
    displaced = floor.crowd[SLOTS - 1]
    tokens = list(displaced.tokens)
    floor.leave(*floor.crowd[SLOTS:])
    floor.add("victim", max_tokens=3)
    floor.step()
    assert displaced.phase is Phase.WAITING
    while displaced.phase is not Phase.RUNNING:
        floor.step()
    assert displaced.tokens[: len(tokens)] == tokens


def test_a_tenant_with_many_requests_takes_no_more_than_leaves_the_other_its_share() -> None:
    floor = Crowd()
    many = [floor.add("victim", max_tokens=LONG) for _ in range(SLOTS)]
    for _ in range(SLOTS):
        floor.step()
    taken = running(many)
    assert 2 <= taken < SLOTS / 2
    assert running(floor.crowd) == SLOTS - taken >= SHARE * (taken - 1)


def test_weights_count() -> None:
    floor = Crowd()
    many = [floor.add("victim", weight=4.0, max_tokens=LONG) for _ in range(SLOTS)]
    for _ in range(SLOTS):
        floor.step()
    assert running(many) > SLOTS / 2


def test_many_small_requests_of_a_newcomer_do_not_displace_one_each() -> None:
    floor = Crowd()
    for _ in range(40):
        short = floor.add("victim", max_tokens=2)
        while short.phase is not Phase.FINISHED:
            floor.step()
    assert sum(each.displaced for each in floor.crowd) <= SLOTS // KEPT_SHARE
    floor.step(seconds=KEPT_S)
    floor.step()
    assert running(floor.crowd) == SLOTS, "what was kept is given back"


def test_tenants_with_few_slots_each_lose_none() -> None:
    floor = Floor(slots=SLOTS)
    small = [floor.add(f"tenant {index // 2}", max_tokens=200) for index in range(SLOTS)]
    floor.step()
    assert SLOTS // (SLOTS // 2) <= SLOTS / LARGE
    floor.add("newcomer")
    for _ in range(5):
        assert not floor.step().preempted
    assert running(small) == SLOTS


def test_nobody_yields_to_its_own_tenant_nor_in_the_last_band() -> None:
    floor = Crowd()
    floor.add("hog")
    assert not floor.step().preempted
    batch = Crowd(priority=LAST_BAND)
    batch.add("victim", priority=LAST_BAND)
    assert not batch.step().preempted


WEIGHTS = {"ann": 1.0, "bob": 1.0, "cat": 4.0, "dan": 0.5}


def sequence_of(tenant: str, band: int) -> Sequence:
    sequence = make_sequence("any", [1], priority=band)
    sequence.request.tenant, sequence.request.weight = tenant, WEIGHTS[tenant]
    return sequence


def obvious_victims(newcomer: Sequence, running: list[Sequence], live: list[Sequence], slots: int) -> list[Sequence]:
    """Counts anew for each of `running` what its tenant has left."""
    band, tenant, weight = newcomer.priority, newcomer.request.tenant, newcomer.request.weight

    def slots_of(name: str) -> int:
        return sum((each.priority, each.request.tenant) == (band, name) and each not in found for each in live)

    found: list[Sequence] = []
    least = kept(slots_of(tenant) / weight, weight)
    for each in running:
        theirs = slots_of(each.request.tenant) if each.priority == band and each.request.tenant != tenant else 0
        if theirs * LARGE > slots and (theirs - 1) / each.request.weight >= least:
            found.append(each)
    return found


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(sorted(WEIGHTS)), st.sampled_from([0, 0, 0, 1]), st.booleans()), max_size=16),
    st.sampled_from(sorted(WEIGHTS)),
    st.integers(1, 20),
)
def test_who_yields_is_as_the_obvious_count_says(live: list[tuple[str, int, bool]], newcomer: str, slots: int) -> None:
    sequences = [sequence_of(tenant, band) for tenant, band, _ in live]
    running = [sequence for sequence, (_, _, runs) in zip(sequences, live, strict=True) if runs]
    for band in (0, 1):
        comes = sequence_of(newcomer, band)
        victims = SlotShares(slots).victims(comes, running, sequences)
        assert victims == obvious_victims(comes, running, sequences, slots)


def test_slots_are_kept_for_a_while_and_no_more_than_a_share_of_all() -> None:
    shares = SlotShares(10 * KEPT_SHARE)
    assert shares.reserved(0.0) == 0
    shares.reserve(3, 5.0)
    shares.reserve(4, 5.0 + KEPT_S / 2)
    assert shares.reserved(5.0 + KEPT_S) == 7
    shares.reserve(4, 5.0 + KEPT_S)
    assert shares.reserved(5.0 + 2 * KEPT_S - 1e-6) == 10
    assert shares.reserved(5.0 + 2 * KEPT_S) == 0
    shares.reserve(1, 100.0)
    assert shares.reserved(100.0) == 1, "what was kept before is over"
    few = SlotShares(KEPT_SHARE - 1)
    few.reserve(5, 0.0)
    assert few.reserved(0.0) == 1


def test_who_comes_into_a_kept_slot_keeps_it_for_longer_and_no_further_one() -> None:
    floor = Crowd()
    first = floor.add("victim", max_tokens=LONG)
    floor.step()
    floor.leave(first)
    second = floor.add("victim", max_tokens=LONG)
    floor.step(seconds=0.6 * KEPT_S)
    assert second.phase is Phase.RUNNING
    floor.leave(second)
    floor.step(seconds=0.6 * KEPT_S)
    assert running(floor.crowd) == SLOTS - 1, "it is kept after the last of them"
    floor.leave(next(each for each in floor.crowd if each.phase is Phase.RUNNING))
    floor.step()
    assert running(floor.crowd) == SLOTS - 1, "one slot was taken, so one is kept"
    floor.step(seconds=KEPT_S)
    assert running(floor.crowd) == SLOTS


def test_nobody_yields_more_often_than_it_may() -> None:
    floor = Crowd()
    for _ in range(200):
        short = floor.add("victim", max_tokens=1)
        for _ in range(3):
            floor.step(seconds=KEPT_S)
        floor.leave(short)
    assert max(each.displaced for each in floor.crowd) == MAX_DISPLACED


def test_memory_that_one_tenant_fills_is_made_room_in() -> None:
    floor = Floor(slots=SLOTS, num_blocks=33)
    crowd = [floor.add("hog", tokens=60, max_tokens=4) for _ in range(SLOTS)]
    floor.step()
    assert 2 < running(crowd) < SLOTS
    newcomer = floor.add("victim", tokens=60)
    floor.step()
    assert newcomer.phase is Phase.RUNNING


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_whatever_comes_and_goes_a_newcomer_is_in_within_a_step_of_a_crowd(data: st.DataObject) -> None:
    """Random arrivals and ends; integrity is checked by each step."""
    slots = data.draw(st.integers(2, 24))
    floor = Floor(slots=slots, num_blocks=2000)
    live: list[Sequence] = []
    now = 0.0
    for _ in range(data.draw(st.integers(1, 60))):
        match data.draw(st.sampled_from(["hog", "other", "end", "step"])):
            case "end" if live:
                gone = live.pop(data.draw(st.integers(0, len(live) - 1)))
                if gone.phase is not Phase.FINISHED:
                    floor.scheduler.finish(gone)
            case "step" | "end":
                now += data.draw(st.sampled_from([0.0, 0.01, 2.0]))
                floor.step(now)
            case tenant:
                weight = 1.0 if tenant == "hog" else 2.0
                live.append(floor.add(tenant, weight=weight, max_tokens=data.draw(st.integers(1, 50))))
    hog = [each for each in live if each.request.tenant == "hog" and each.phase is Phase.RUNNING]
    fresh = [each for each in hog if each.displaced < MAX_DISPLACED]
    newcomer = floor.add("newcomer")
    floor.step(now)
    if len(hog) == slots and fresh:
        assert newcomer.phase is Phase.RUNNING


@pytest.mark.parametrize("slots", [1, 2, 3])
def test_the_last_slot_of_a_tenant_stays_its_own(slots: int) -> None:
    floor = Floor(slots=slots)
    hog = [floor.add("hog", max_tokens=50) for _ in range(slots)]
    floor.step()
    newcomers = [floor.add("victim", max_tokens=50) for _ in range(slots)]
    for _ in range(slots):
        floor.step()
    assert running(hog) >= 1
    assert running(newcomers) == (1 if slots > 1 else 0)


def test_no_output_changes_because_a_newcomer_took_a_slot(folder: Path) -> None:
    prompts = {f"hog {index}": [index + 3] * 20 for index in range(4)}
    with EngineUnderTest(folder, max_num_seqs=4) as alone:
        expected = {name: alone.tokens(alone.submit(name, prompt, max_tokens=300)) for name, prompt in prompts.items()}
    with EngineUnderTest(folder, max_num_seqs=4) as engine:
        keys = [engine.submit(name, prompt, max_tokens=300, tenant="hog") for name, prompt in prompts.items()]
        wait_for(lambda: all(engine.outputs.get(key) for key in keys))
        newcomer = engine.submit("newcomer", [9] * 20, max_tokens=3, tenant="victim")
        assert len(engine.tokens(newcomer)) == 3
        assert {key.request_id: engine.tokens(key) for key in keys} == expected
        told = [output.preempted for key in keys for output in engine.outputs[key] if output.preempted is not None]
        assert set(told) <= {Preemption.PRIORITY}
