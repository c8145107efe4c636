"""What a worker says about reuse: in the report of a request, over the wire, and in metrics."""

from __future__ import annotations

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from tandem.common.errors import ConfigError
from tandem.engine.request import PromptReport, RequestKey, RequestOutput
from tandem.engine.store.cache import EngineStore
from tandem.engine.store.stats import StoreCounters
from tandem.proto import worker_pb2
from tandem.worker.metrics import WorkerMetrics
from tandem.worker.wire import output_from_proto, output_to_proto, pack_first, request_from_proto, unpack_first
from tests.engine.store.scripted_home import ScriptedHome

OUTPUT = RequestOutput(
    RequestKey("a", 1),
    token_ids=[5],
    prompt=PromptReport(cached_tokens=300, cached_by_tier={"device": 44, "disk": 256}, near_tokens=200, inexact_from=0),
)


def test_tiers_travel_to_the_router() -> None:
    assert output_from_proto(output_to_proto(OUTPUT)) == OUTPUT


def test_tiers_travel_with_a_hand_over() -> None:
    assert unpack_first(pack_first(OUTPUT, "", 1.0), "", 2.0) == OUTPUT


@pytest.mark.parametrize(
    ("sender", "since_accept_s", "accepted_at", "seconds"),
    [
        ("here", 3.0, 2.0, 6.0),  # one clock: computed at 4, whatever is said of the Accept
        ("here", 0.0, 7.0, 3.0),  # the KV was welcome later than it was computed
        ("there", 3.0, 2.0, 5.0),  # two clocks: 3 s after the Accept
        ("there", -1.0, 2.0, 8.0),
        ("", 3.0, 2.0, 5.0),  # a host without a name has a clock of its own
    ],
)
def test_a_hand_over_is_measured_on_one_clock(
    sender: str, since_accept_s: float, accepted_at: float, seconds: float
) -> None:
    first = unpack_first(pack_first(OUTPUT, sender, 4.0, since_accept_s), "here", 10.0, accepted_at)
    assert first.prompt is not None
    assert first.prompt.handover_s == pytest.approx(seconds)


def test_the_tenant_comes_with_the_request() -> None:
    key = worker_pb2.RequestKey(request_id="a", epoch=1)
    sampling = worker_pb2.SamplingParams(max_tokens=1, top_p=1.0, repetition_penalty=1.0)
    assert request_from_proto(worker_pb2.Submit(key=key, sampling=sampling, tenant="acme")).tenant == "acme"
    assert request_from_proto(worker_pb2.Submit(key=key, sampling=sampling)).tenant == "default"


@pytest.mark.parametrize("exact_kv", [False, True])
def test_a_request_says_whether_it_wants_exact_kv(exact_kv: bool) -> None:
    sampling = worker_pb2.SamplingParams(max_tokens=1, top_p=1.0, repetition_penalty=1.0)
    request = request_from_proto(worker_pb2.Submit(sampling=sampling, exact_kv=exact_kv))
    assert request.near_allowed != exact_kv


def test_metrics_name_tiers_and_outcomes() -> None:
    counters, registry = StoreCounters(), CollectorRegistry()
    counters.lookup("fetch")
    counters.load("corrupt", 0.5, {"disk": 256})
    counters.save("saved", 0.25)
    counters.gate_missed()
    WorkerMetrics(worker_pb2.WorkerStatus, registry, counters.snapshot).output(OUTPUT)
    text = generate_latest(registry).decode()
    for line in (
        'tandem_worker_cached_prompt_tokens_by_tier_total{tier="disk"} 256.0',
        "tandem_worker_near_prompt_tokens_total 200.0",
        'tandem_worker_store_lookups_total{outcome="fetch"} 1.0',
        'tandem_worker_store_loads_total{outcome="corrupt"} 1.0',
        'tandem_worker_store_loaded_tokens_total{tier="disk"} 256.0',
        'tandem_worker_store_saves_total{outcome="saved"} 1.0',
        "tandem_worker_store_load_seconds_total 0.5",
        "tandem_worker_store_save_seconds_total 0.25",
        "tandem_worker_store_gates_missed_total 1.0",
    ):
        assert line in text


def test_a_worker_without_a_store_has_no_store_metrics() -> None:
    registry = CollectorRegistry()
    WorkerMetrics(worker_pb2.WorkerStatus, registry)
    assert "tandem_worker_store" not in generate_latest(registry).decode()


@pytest.mark.parametrize("name", ["chunk_tokens", "save_queue", "loaders"])
def test_settings_that_make_no_sense_are_refused(name: str) -> None:
    options: dict[str, int] = {name: 0}
    with pytest.raises(ConfigError, match=name):
        EngineStore(ScriptedHome(), **options)  # type: ignore[arg-type]


def test_chunks_have_to_be_whole_blocks() -> None:
    store = EngineStore(ScriptedHome(), chunk_tokens=40)
    with pytest.raises(ConfigError, match=r"chunk_tokens 40.*block_size 16"):
        store.check(16)
