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
from tests.e2e.host_clients import HostClients
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


def started(model: Path, family: int, **settings: str) -> Iterator[Hosts]:
    try:
        made = Hosts(model, family, **settings)
    except NoNamespaces as error:
        pytest.skip(f"no hosts of their own here: {error}")
    with made:
        made.start()
        eventually(lambda: made.workers() == WORKERS, what="all workers are connected")
        yield made


@pytest.fixture(params=[pytest.param(4, marks=pytest.mark.slow), 6], ids=["ipv4", "ipv6"])
def hosts(request: pytest.FixtureRequest, costly: Path) -> Iterator[Hosts]:
    yield from started(costly, request.param, TANDEM_DISAGGREGATE="always")


@pytest.fixture
def patient_hosts(costly: Path) -> Iterator[Hosts]:
    """Requests wait for workers as long as the machine needs."""
    yield from started(costly, 4, TANDEM_DISAGGREGATE="always", TANDEM_WORKER_WAIT_S="180")


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


@pytest.mark.timeout(900)
def test_silent_cuts_and_a_host_that_comes_back_elsewhere_fail_no_request(patient_hosts: Hosts) -> None:
    hosts = patient_hosts
    questions = [{"prompt": [50 + number, *range(20, 120)], "max_tokens": 24} for number in range(6)]
    with HostClients(hosts, questions, 3) as clients:
        clients.wait(3)
        hosts.network.cut("router", "decode-0")
        eventually(lambda: hosts.workers() == WORKERS - {"decode-0"}, what="the silent worker is given up")
        clients.wait(6)
        hosts.network.cut("prefill-0", "decode-1")
        clients.wait(6)
        hosts.network.heal("prefill-0", "decode-1")
        hosts.network.heal("router", "decode-0")
        eventually(lambda: hosts.workers() == WORKERS, what="it is used again")
        before = hosts.network.address("decode-1")
        hosts.network.cut("decode-1")
        for part in hosts.on("decode-1"):
            part.kill(signal.SIGKILL)
        hosts.network.move("decode-1")
        hosts.start(hosts.on("decode-1"))
        expected = {hosts.network.address(name) for name in WORKERS}
        eventually(lambda: hosts.addresses() == expected, what=f"its name leads elsewhere than to {before}")
        clients.wait(6)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_router_that_starts_beside_a_worker_with_other_weights_waits_for_its_own(
    patient_hosts: Hosts, tmp_path: Path
) -> None:
    hosts = patient_hosts
    question = {"prompt": [50, *range(20, 120)], "max_tokens": 8, "temperature": 0}
    with hosts.inside() as http:
        right = ask(http, MODEL, question, stream=False)
    for part in (hosts["decode@decode-0"], hosts["decode@decode-1"], hosts["router@router"]):
        part.kill(signal.SIGKILL)
    hosts.give_model("decode-1", costly_model(tmp_path, initializer_range=0.05))
    hosts["decode@decode-1"].start()
    hosts["router@router"].start()
    hosts.wait_ready(hosts["decode@decode-1"])
    target = f"{hosts.network.address('decode-1')}:9200"
    eventually(lambda: "other weights" in hosts.problems().get(target, ""), what="it is refused")
    hosts.start([hosts["decode@decode-0"]])
    eventually(lambda: hosts.workers() == {"prefill-0", "decode-0"}, what="the right one is used")
    with hosts.inside() as http:
        assert ask(http, MODEL, question, stream=False) == right
