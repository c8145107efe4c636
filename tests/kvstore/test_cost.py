"""What the cost model learns, and what is decided with it."""

from __future__ import annotations

import random
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tandem.kvstore.cost import PRIORS, CodecCost, LinkCost, LinkCosts, choose_codec, choose_fetch
from tandem.kvstore.interfaces import Located, ObjectKey, TierName

CHUNK_BYTES = 640 << 10
TIERS = [TierName.HOST, TierName.DISK, TierName.PEER, TierName.REMOTE]


def located(*links: str, size: int = CHUNK_BYTES) -> list[Located]:
    return [
        Located(ObjectKey(index.to_bytes(32, "big")), TierName(link.partition(":")[0]), link, size)
        for index, link in enumerate(links)
    ]


def learned(link: str, cost: LinkCost, noise: float = 0.0, fetches: int = 60) -> LinkCosts:
    links, rng = LinkCosts(), random.Random(7)
    for _ in range(fetches):
        count = rng.randint(1, 32)
        seconds = cost.seconds(count * CHUNK_BYTES, count)
        links.observe(link, count * CHUNK_BYTES, count, seconds * rng.uniform(1 - noise, 1 + noise))
    return links


@pytest.mark.parametrize(
    ("link", "latency_s", "bytes_per_s"),
    [("disk", 0.2e-3, 1e9), ("peer:n1", 0.5e-3, 1e9), ("remote", 1e-3, 0.3e9), ("host", 1e-5, 5e9)],
)
def test_before_data_the_priors_hold(link: str, latency_s: float, bytes_per_s: float) -> None:
    assert LinkCosts().estimate(link, 10 << 20, 1) == pytest.approx(latency_s + (10 << 20) / bytes_per_s)


@pytest.mark.parametrize("times_slower", [0.02, 0.3, 1.0, 10.0, 1000.0])
@pytest.mark.parametrize("link", ["disk", "remote", "host"])
def test_a_link_is_learned_whatever_its_speed(link: str, times_slower: float) -> None:
    prior = PRIORS[link]
    truth = LinkCost(prior.latency_s * times_slower, prior.seconds_per_byte * times_slower)
    links = learned(link, truth, noise=0.2)
    for count in (1, 4, 32):
        expected = truth.seconds(count * CHUNK_BYTES, count)
        assert links.estimate(link, count * CHUNK_BYTES, count) == pytest.approx(expected, rel=0.25)


def test_latency_and_bandwidth_are_told_apart() -> None:
    truth = LinkCost(20e-3, 1 / 4e9)
    links = learned("remote", truth, noise=0.05)
    assert links.estimate("remote", 4096, 1) == pytest.approx(20e-3, rel=0.3)
    assert links.estimate("remote", 32 * CHUNK_BYTES, 32) == pytest.approx(truth.seconds(32 * CHUNK_BYTES, 32), rel=0.2)


def test_one_stalled_fetch_never_doubles_an_estimate() -> None:
    links = learned("disk", PRIORS["disk"])
    before = links.estimate("disk", CHUNK_BYTES, 1)
    links.observe("disk", CHUNK_BYTES, 1, 60.0)
    assert links.estimate("disk", CHUNK_BYTES, 1) < 2 * before


def test_a_lasting_change_is_followed_both_ways() -> None:
    links = learned("disk", PRIORS["disk"])
    before = links.estimate("disk", 8 * CHUNK_BYTES, 8)
    for _ in range(60):
        links.observe("disk", 8 * CHUNK_BYTES, 8, 20 * before)
    assert links.estimate("disk", 8 * CHUNK_BYTES, 8) == pytest.approx(20 * before, rel=0.15)
    for _ in range(150):
        links.observe("disk", 8 * CHUNK_BYTES, 8, before)
    assert links.estimate("disk", 8 * CHUNK_BYTES, 8) == pytest.approx(before, rel=0.15)


def test_links_are_apart_and_bounded() -> None:
    links = LinkCosts()
    for index in range(LinkCosts.MAX_LINKS + 1):
        links.observe(f"peer:{index}", CHUNK_BYTES, 1, 1.0)
    untouched = LinkCosts().estimate("peer:0", CHUNK_BYTES, 1)
    assert links.estimate("peer:0", CHUNK_BYTES, 1) == untouched
    assert links.estimate("peer:1", CHUNK_BYTES, 1) > 10 * untouched


@pytest.mark.parametrize(
    ("size", "count", "seconds"),
    [(1, 0, 1.0), (-1, 1, 1.0), (1, 1, 0.0), (1, 1, -1.0), (1, 1, float("inf")), (1, 1, float("nan"))],
)
def test_impossible_figures_are_ignored(size: int, count: int, seconds: float) -> None:
    links = LinkCosts()
    links.observe("disk", size, count, seconds)
    assert links.cost("disk") == PRIORS["disk"]


def test_many_threads_may_observe_at_once() -> None:
    links = LinkCosts()

    def observe() -> None:
        for _ in range(300):
            links.observe("disk", CHUNK_BYTES, 1, 0.01)
            links.passed_over("disk")

    threads = [threading.Thread(target=observe) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert links.estimate("disk", CHUNK_BYTES, 1) == pytest.approx(0.01, rel=0.1)


observations = st.lists(
    st.tuples(st.sampled_from(TIERS), st.integers(0, 1 << 28), st.integers(1, 64), st.floats(1e-6, 1e3)), max_size=30
)


@settings(max_examples=80, deadline=None)
@given(seen=observations, size=st.integers(0, 1 << 28), more=st.integers(0, 1 << 28), count=st.integers(1, 64))
def test_an_estimate_is_positive_and_grows_with_the_work(
    seen: list[tuple[str, int, int, float]], size: int, more: int, count: int
) -> None:
    links = LinkCosts()
    for link, seen_bytes, objects, seconds in seen:
        links.observe(link, seen_bytes, objects, seconds)
    for link in TIERS:
        assert 0 < links.estimate(link, size, count) <= links.estimate(link, size + more, count)
        assert links.estimate(link, size, count) < links.estimate(link, size, count + 1)


# Fetch or recompute


@settings(max_examples=150, deadline=None)
@given(
    seen=observations,
    places=st.lists(st.sampled_from(TIERS), max_size=12),
    size=st.integers(1, 64 << 20),
    cached=st.integers(0, 700),
    rest=st.integers(1, 4000),
    rate=st.floats(1.0, 1e7),
)
def test_no_split_is_better_than_the_chosen_one(
    seen: list[tuple[str, int, int, float]], places: list[str], size: int, cached: int, rest: int, rate: float
) -> None:
    links = LinkCosts()
    for link, seen_bytes, objects, seconds in seen:
        links.observe(link, seen_bytes, objects, seconds)
    prompt, found, first = cached + rest, located(*places, size=size), cached // 256 * 256

    def total(count: int) -> float:
        used = found[:count]
        fetch = sum(
            links.estimate(link, sum(item.size for item in used if item.link == link), number)
            for link in {item.link for item in used}
            if (number := sum(1 for item in used if item.link == link))
        )
        reached = max(cached, min(first + count * 256, prompt - 1)) if count else cached
        return fetch + (prompt - reached) / rate

    totals = [total(count) for count in range(len(found) + 1)]
    plan = choose_fetch(found, 256, cached, prompt, rate, links)
    assert plan.fetch_s + plan.recompute_s == pytest.approx(min(totals))
    assert totals[plan.num_objects] == pytest.approx(min(totals))
    assert plan.num_objects == 0 or first + (plan.num_objects - 1) * 256 < prompt - 1, "a chunk nobody needs"
    assert plan.why


@settings(max_examples=60, deadline=None)
@given(speed=st.floats(1e6, 1e11), faster=st.floats(1.0, 100.0), rate=st.floats(100.0, 1e6), count=st.integers(1, 12))
def test_a_faster_link_never_means_fetching_less(speed: float, faster: float, rate: float, count: int) -> None:
    slow, fast = (
        choose_fetch(
            located(*["peer:n"] * count), 256, 0, 3000, rate, learned("peer:n", LinkCost(1e-4, 1 / each), fetches=30)
        )
        for each in (speed, speed * faster)
    )
    assert fast.num_objects >= slow.num_objects


def test_a_slow_tail_is_left_to_compute() -> None:
    links = learned("remote", LinkCost(1e-3, 1 / 1e6))
    plan = choose_fetch(located("host", "host", "remote"), 256, 0, 2000, 10_000.0, links)
    assert plan.num_objects == 2
    assert plan.recompute_s == pytest.approx((2000 - 512) / 10_000)


def test_a_plan_takes_what_its_links_take_for_all_their_objects() -> None:
    links = LinkCosts()
    plan = choose_fetch(located("disk", "host", "disk", "disk", "host", "disk"), 256, 0, 2000, 10.0, links)
    assert plan.num_objects == 6
    seconds = links.estimate("disk", 4 * CHUNK_BYTES, 4) + links.estimate("host", 2 * CHUNK_BYTES, 2)
    assert plan.fetch_s == pytest.approx(seconds)


@pytest.mark.parametrize(("prompt", "objects"), [(256, 1), (257, 1), (258, 2), (512, 2), (1, 0)])
def test_the_last_token_is_always_computed(prompt: int, objects: int) -> None:
    plan = choose_fetch(located("host", "host", "host"), 256, 0, prompt, 1000.0, LinkCosts())
    assert plan.num_objects == objects
    assert plan.recompute_s >= 1 / 1000.0


def test_without_a_prefill_rate_everything_useful_is_fetched() -> None:
    assert choose_fetch(located("disk", "disk", "disk"), 256, 0, 513, 0.0, LinkCosts()).num_objects == 2


def test_a_link_that_was_slow_once_is_tried_again() -> None:
    links = learned("disk", LinkCost(0.1, 1 / 1e6))
    found = located("disk", "disk")
    tries = next(n for n in range(1000) if choose_fetch(found, 256, 0, 600, 20_000.0, links).num_objects > 0)
    assert 10 < tries < 600


# Codecs

CODECS = {
    "lossless": CodecCost(300e6, 600e6, 1.4, exact=True),
    "kivi-int8": CodecCost(500e6, 1e9, 1.78, exact=False),
    "kivi-int4": CodecCost(500e6, 1e9, 3.2, exact=False),
}


def at_speed(bytes_per_s: float) -> LinkCosts:
    return learned("remote", LinkCost(1e-4, 1 / bytes_per_s))


def test_raw_on_fast_links_and_smaller_on_slow_ones() -> None:
    assert choose_codec(CHUNK_BYTES, "remote", CODECS, True, at_speed(5e9)) == "raw"
    assert choose_codec(CHUNK_BYTES, "remote", CODECS, True, at_speed(5e7)) == "kivi-int4"
    assert choose_codec(CHUNK_BYTES, "remote", CODECS, False, at_speed(1e7)) == "lossless"


def test_what_is_encoded_already_need_not_be_encoded_again() -> None:
    links = at_speed(4e8)
    assert choose_codec(CHUNK_BYTES, "remote", CODECS, True, links) == "raw"
    assert choose_codec(CHUNK_BYTES, "remote", CODECS, True, links, stored="kivi-int8") == "kivi-int8"


def test_near_content_is_not_sent_where_only_exact_is_allowed() -> None:
    assert choose_codec(CHUNK_BYTES, "remote", CODECS, False, LinkCosts(), stored="kivi-int4") == ""
    assert choose_codec(CHUNK_BYTES, "remote", CODECS, True, LinkCosts(), stored="unheard-of") == ""


@settings(max_examples=60, deadline=None)
@given(speed=st.floats(1e6, 1e11), faster=st.floats(1.0, 100.0), near=st.booleans(), size=st.integers(4096, 64 << 20))
def test_a_faster_link_never_means_more_compression(speed: float, faster: float, near: bool, size: int) -> None:
    ratios = {"raw": 1.0, **{name: codec.ratio for name, codec in CODECS.items()}}
    slow, fast = (choose_codec(size, "remote", CODECS, near, at_speed(each)) for each in (speed, speed * faster))
    assert ratios[fast] <= ratios[slow]
    assert near or {slow, fast} <= {"raw", "lossless"}


@pytest.mark.parametrize("num_objects", [2, 7, 31])
@pytest.mark.parametrize("num_layers", [5, 32])
@pytest.mark.parametrize("overlap_s", [0.0, 0.05, 0.1, 0.5])
def test_the_codec_is_chosen_for_the_first_token_not_for_the_last_byte(
    num_objects: int, num_layers: int, overlap_s: float
) -> None:
    """Raw layers arrive while earlier ones are computed with; encoded objects come whole, one after the other."""
    latency_s, one = 1e-4, CHUNK_BYTES
    for speed in (1e7, 3e7, 1e8, 3e8, 1e9, 1e10):
        transfer_s = LinkCost(latency_s, 1 / speed).seconds(num_objects * one, num_objects)
        ready_s = {"raw": max(transfer_s / num_layers + overlap_s, transfer_s + overlap_s / num_layers)}
        for name, codec in CODECS.items():
            wire_s = latency_s + one / codec.ratio / speed
            each_s = one / codec.encode_bytes_per_s + wire_s + one / codec.decode_bytes_per_s
            ready_s[name] = num_objects * each_s + overlap_s
        chosen = choose_codec(
            num_objects * one, "remote", CODECS, True, at_speed(speed), num_objects=num_objects, overlap_s=overlap_s
        )
        assert ready_s[chosen] <= 1.1 * min(ready_s.values())
