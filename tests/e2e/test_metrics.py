"""`/metrics` of the running platform: every process, nothing that Prometheus objects to."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

from tests.e2e.serving import Serve, eventually
from tests.metric_rules import problems

OTHERS = {"prefill-0", "decode-0", "kvstore"}
PROCESSES = OTHERS | {"router"}


def up(text: str) -> dict[str, float]:
    families = {family.name: family for family in text_string_to_metric_families(text)}
    return {sample.labels["process"]: sample.value for sample in families["tandem_up"].samples}


def of_all(serve: Serve) -> str:
    """One answer in which no process was late."""
    text = ""

    def is_whole() -> bool:
        nonlocal text
        text = serve.http.get("/metrics").text
        return up(text) == dict.fromkeys(PROCESSES, 1.0)

    eventually(is_whole, what="an answer for all processes")
    return text


def value(text: str, name: str, process: str) -> float:
    """The sum over all series of this name and process."""
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    return sum(each.value for each in samples if each.name == name and each.labels["process"] == process)


def generated(text: str) -> float:
    return value(text, "tandem_worker_generated_tokens_total", "decode-0")


def test_one_address_tells_of_all_processes(serves: Callable[..., Serve], tiny: Path) -> None:
    serve = serves(tiny, "--disaggregate", "always", "--dtype", "float32")
    before = generated(of_all(serve))
    serve.tokens(list(range(3, 60)), 5)
    text = of_all(serve)
    assert problems(text) == []
    assert generated(text) == before + 5
    sent, received = (value(text, "tandem_handover_bytes_total", name) for name in ("prefill-0", "decode-0"))
    assert sent == received > 0
    assert serve.metric("tandem_handover_transport_bytes_total", process="decode-0", transport="shared_memory") == sent
    assert serve.metric("tandem_router_kv_moved_bytes_total", transport="shared_memory", codec="raw") > 0
    streams = "tandem_handover_streams_total"
    eventually(lambda: serve.metric(streams, process="prefill-0", outcome="done") >= 1, what="a stream that is done")
    memory = {name: value(text, "process_resident_memory_bytes", name) for name in PROCESSES}
    assert all(size > 10_000_000 for size in memory.values()), memory
    assert value(text, "tandem_kvstore_tier_capacity_bytes", "kvstore") > 0
    for reason in ("memory", "priority"):
        assert f'tandem_worker_preemptions_total{{process="decode-0",reason="{reason}"}}' in text


def test_several_routers_and_a_stopped_store(tiny: Path) -> None:
    with Serve(tiny, "--dtype", "float32", "--routers", 2) as serve:
        eventually(
            lambda: set(up(serve.http.get("/metrics").text)) == PROCESSES - {"router"} | {"router-0", "router-1"}
        )
        text = serve.http.get("/metrics").text
        assert problems(text) == []
        store = serve.children()["kvstore"].pid

        def states(*names: str) -> list[float]:
            found = up(serve.http.get("/metrics").text)
            return [found[name] for name in names]

        os.kill(store, signal.SIGSTOP)
        try:
            eventually(
                lambda: (found := up(serve.http.get("/metrics").text))["kvstore"] == 0 and found["decode-0"] == 1
            )
        finally:
            os.kill(store, signal.SIGCONT)
