"""The books of one worker: room beside other routers' work, output beyond what was expected, who yields a slot."""

from __future__ import annotations

import pytest

from tandem.common.fairness import LAST_BAND
from tandem.common.slot_shares import LARGE
from tandem.planner.perf_model import PerfModel
from tandem.router.fleet.load import Work, WorkerLoad

CAPACITY = 1000
SLOTS = 2 * LARGE


def make_load(*, slots: int = SLOTS) -> WorkerLoad:
    return WorkerLoad(PerfModel(), 0, capacity_tokens=CAPACITY, max_requests=slots)


def report(load: WorkerLoad, by_band: dict[int, int], tokens: int = 0) -> None:
    """Other routers' requests, which take `tokens` of memory."""
    count = sum(by_band.values())
    load.foreign(requests=count, decoding=count, pending_tokens=0, used_tokens=tokens, by_band=by_band)


def begin(load: WorkerLoad, *, tenant: str = "", count: int = 1, weight: float = 1.0, priority: int = 0) -> None:
    for _ in range(count):
        Work(load, 1, 1, 0.0, tenant=tenant, weight=weight, priority=priority).start(0.0)


def test_memory_of_other_routers_requests_is_not_to_be_had() -> None:
    load = make_load()
    report(load, {0: 1, 5: 3}, tokens=400)
    assert load.has_room(CAPACITY - 400, 0, priority=5)
    assert not load.has_room(CAPACITY - 400 + 1, 0, priority=5)
    assert load.has_room(CAPACITY - 100, 0, priority=0), "three in four of them are of a later band"
    assert not load.has_room(CAPACITY - 100 + 1, 0, priority=0)


def test_own_and_other_routers_memory_add_up() -> None:
    load = make_load()
    Work(load, 100, 50, 0.0, cached_tokens=40).start(0.0)
    report(load, {0: 1}, tokens=400)
    assert load.has_room(CAPACITY - 400 - 110, 0)
    assert not load.has_room(CAPACITY - 400 - 110 + 1, 0)


def test_output_takes_more_room_only_beyond_what_was_expected() -> None:
    load = make_load()
    work = Work(load, 100, 10, 0.0, priority=3)
    work.start(0.0)
    for tokens, reserved in ((4, 110), (6, 110), (3, 113), (2, 115)):
        work.produced(tokens)
        assert (load.reserved_tokens, load.bands[3].reserved_tokens) == (reserved, reserved)
    assert load.kv_tokens == 100 + 15
    work.end(0.0)
    assert (load.reserved_tokens, load.kv_tokens, load.requests, load.bands) == (0, 0, 0, {})


@pytest.mark.parametrize(("held", "yields"), [(SLOTS // LARGE, False), (SLOTS // LARGE + 1, True)])
@pytest.mark.parametrize("router", ["this one", "another"])
def test_only_who_has_more_than_a_few_slots_yields(held: int, yields: bool, router: str) -> None:
    load = make_load()
    if router == "this one":
        begin(load, tenant="hog", count=held)
    else:
        report(load, {0: held})
    assert load.yields_to("newcomer", 1.0, 0) is yields
    assert not load.yields_to("newcomer", 1.0, 1), "bands are strict"


def test_a_tenant_yields_down_to_what_its_weight_is_worth() -> None:
    load = make_load()
    begin(load, tenant="hog", count=4, weight=4.0)
    assert not load.yields_to("newcomer", 1.0, 0), "three slots of its weight are less than one"
    begin(load, tenant="hog", weight=4.0)
    assert load.yields_to("newcomer", 1.0, 0)
    assert not load.yields_to("newcomer", 0.5, 0), "who counts half takes a slot from two"


def test_nobody_yields_in_the_last_band() -> None:
    load = make_load()
    begin(load, tenant="hog", count=SLOTS, priority=LAST_BAND)
    assert not load.yields_to("newcomer", 1.0, LAST_BAND)
