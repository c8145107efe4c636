"""One answer for the metrics of all processes: labels, absent and slow processes, and what Prometheus thinks of it."""

from __future__ import annotations

import asyncio

import pytest
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from tandem.router.http import all_metrics
from tandem.router.http.all_metrics import merged
from tests.metric_rules import problems
from tests.router.conftest import PATIENCE_S, House, until

BODY = {"prompt": "Hello", "max_tokens": 3}


@pytest.mark.parametrize("value", ["plain", 'quote " back \\ slash', "line\nbreak", "br{ace} and space", "\u2028"])
def test_every_sample_is_kept_and_says_whose_it_is(value: str) -> None:
    registry = CollectorRegistry()
    Counter("requests", "Answered\nones", ["path"], registry=registry).labels(value).inc(3)
    Gauge("free", "Free", registry=registry).set(1.5)
    Histogram("took_seconds", "Took", buckets=(0.1, 1.0), registry=registry).observe(0.5)
    text = generate_latest(registry).decode()
    together = merged({"a-0": text, value: text, "gone": None}).decode()
    samples = {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(together)
        for sample in family.samples
    }
    alone = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    for process in ("a-0", value):
        for sample in alone:
            assert samples[sample.name, frozenset({**sample.labels, "process": process}.items())] == sample.value
        assert samples["tandem_up", frozenset({("process", process)})] == 1
    assert samples["tandem_up", frozenset({("process", "gone")})] == 0
    assert len(samples) == 2 * len(alone) + 3
    assert problems(together) == []


def test_the_rules_find_what_is_wrong() -> None:
    head = "# HELP x_ms X\n# TYPE x_ms gauge\nx_ms 1\n"
    assert problems(head)
    assert problems("# HELP free Free\n# TYPE free gauge\nfree 1\nfree 2\n")
    assert problems("# TYPE free gauge\nfree 1\n")
    assert problems("# HELP free_total Free\n# TYPE free_total gauge\nfree_total 1\n")
    assert problems("# HELP free Free\n# TYPE free gauge\nfree 1\n") == []


async def test_the_router_answers_for_its_workers(house: House) -> None:
    decode = await house.decode()
    prefill = await house.prefill(to=(decode,))
    client = await house.client(await house.router(decode, prefill))
    await client.post("/v1/completions", json=BODY)
    text = (await client.get("/metrics")).text
    for process in ("router", "decode-0", "prefill-0"):
        assert f'tandem_up{{process="{process}"}} 1' in text
    assert 'tandem_worker_generated_tokens_total{process="decode-0"}' in text
    assert 'process_resident_memory_bytes{process="router"}' in text
    assert problems(text) == []


async def test_a_dead_and_a_frozen_worker_are_left_out_in_time(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(all_metrics, "ANSWER_S", 0.3)
    workers = [await house.decode(f"decode-{index}") for index in range(3)]
    client = await house.client(await house.router(*workers, silence_s=3600.0))
    workers[0].freeze()
    await workers[1].kill()
    ups = [f'tandem_up{{process="decode-{index}"}} {up}' for index, up in enumerate((0, 0, 1))]
    text = ""
    async with asyncio.timeout(PATIENCE_S):
        while not all(up in text for up in ups):  # one that lives may be late, too
            text = (await client.get("/metrics")).text
            assert problems(text) == []


async def test_a_worker_that_was_never_there_is_named_by_its_address(house: House) -> None:
    worker = await house.decode("late")
    await worker.kill()
    router = await house.router(worker, wait=False)
    client = await house.client(router)
    assert f'tandem_up{{process="{worker.target}"}} 0' in (await client.get("/metrics")).text
    await worker.start()
    await until(lambda: router.fleet.clients[0].session)
    assert 'tandem_up{process="late"} 1' in (await client.get("/metrics")).text
