"""The platform on hosts of its own, started as docs/several-machines.md says."""

from __future__ import annotations

import signal
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.e2e.cluster import costly_model
from tests.e2e.conftest import ServeFactory
from tests.e2e.hosts import MODEL, Hosts
from tests.e2e.network import NoNamespaces
from tests.e2e.serving import KINDS, ask, eventually

QUESTIONS: list[dict[str, Any]] = [
    {"prompt": [7 + number, *range(20, 220)], "max_tokens": 24, **kind} for number, kind in enumerate(KINDS)
]
WORKERS = {"prefill-0", "decode-0", "decode-1"}


@pytest.fixture(scope="module")
def costly(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return costly_model(tmp_path_factory.mktemp("hosts"))


@pytest.fixture(params=[4, 6], ids=["ipv4", "ipv6"])
def hosts(request: pytest.FixtureRequest, costly: Path) -> Iterator[Hosts]:
    try:
        made = Hosts(costly, request.param, TANDEM_DISAGGREGATE="always")
    except NoNamespaces as error:
        pytest.skip(f"no hosts of their own here: {error}")
    with made:
        made.start()
        eventually(lambda: made.workers() == WORKERS, what="all workers are connected")
        yield made


def tiers(http: httpx.Client, prompt: list[int]) -> dict[str, int]:
    """Cached tokens of a completion by where they came from."""
    body = {"model": MODEL, "prompt": prompt, "max_tokens": 1, "temperature": 0}
    answer = http.post("/v1/completions", json=body)
    assert answer.status_code == 200, answer.text
    found: dict[str, int] = answer.json()["usage"]["prompt_tokens_details"].get("cached_tokens_by_tier", {})
    return found


@pytest.mark.timeout(900)
def test_hosts_answer_as_one_machine_does_and_share_their_kv(hosts: Hosts, costly: Path, serves: ServeFactory) -> None:
    alone = serves(costly, "--dtype", "float32", "--prefill", "0", "--kv-host-bytes", "0")
    answers = [ask(alone.http, alone.model, question, stream=False) for question in QUESTIONS]
    with hosts.inside() as http:
        for number, question in enumerate(QUESTIONS):
            assert ask(http, MODEL, question, stream=number % 2 == 0) == answers[number]
        assert 'reason="handover"' in http.get("/metrics").text, "KV went from host to host"
        prompts = [[100 + number, *range(20, 500)] for number in range(40)]
        for prompt in prompts:
            tiers(http, prompt)
        lost = [*hosts.on("decode-0"), hosts["decode@decode-1"], hosts["prefill@prefill-0"]]
        for part in lost:
            part.kill(signal.SIGKILL)
        hosts.start(hosts.on("decode-0"))
        eventually(lambda: hosts.workers() == {"decode-0"}, what="one worker is back, and knows nothing")
        seen: Counter[str] = Counter()
        for prompt in prompts:
            seen.update(tiers(http, prompt))
            if "peer" in seen:
                return
        raise AssertionError(f"nothing came from the store nodes beside dead workers: {seen}")
