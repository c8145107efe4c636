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


def test_one_address_tells_of_all_processes(serves: Callable[..., Serve], tiny: Path) -> None:
    serve = serves(tiny, "--disaggregate", "always", "--dtype", "float32")
    before = serve.metric("tandem_worker_generated_tokens_total", process="decode-0")
    serve.tokens(list(range(3, 60)), 5)
    text = serve.http.get("/metrics").text
    assert problems(text) == []
    assert up(text) == dict.fromkeys(PROCESSES, 1.0)
    assert serve.metric("tandem_worker_generated_tokens_total", process="decode-0") == before + 5
    sent, received = (serve.metric("tandem_handover_bytes_total", process=name) for name in ("prefill-0", "decode-0"))
    assert sent == received > 0
    assert serve.metric("tandem_handover_streams_total", process="prefill-0", outcome="done") >= 1
    memory = {name: serve.metric("process_resident_memory_bytes", process=name) for name in PROCESSES}
    assert all(size > 10_000_000 for size in memory.values()), memory
    assert serve.metric("tandem_kvstore_tier_capacity_bytes", process="kvstore") > 0
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
        os.kill(store, signal.SIGSTOP)
        try:
            state = up(serve.http.get("/metrics").text)
        finally:
            os.kill(store, signal.SIGCONT)
        assert state["kvstore"] == 0
        assert state["decode-0"] == 1
