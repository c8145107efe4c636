"""A dead or frozen prefill worker, or client, costs time and never a wrong token. Decode workers: test_continuation."""

from __future__ import annotations

import signal
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from tests.e2e.serving import Serve, eventually

MakePrompt = Callable[[int], list[int]]


@pytest.fixture
def serve(serves: Callable[..., Serve], slow_model: Path) -> Serve:
    """All workers connected again, whatever the test before did to them."""
    serve = serves(slow_model, "--disaggregate", "always", "--dtype", "float32")
    eventually(lambda: serve.metric("tandem_worker_up") == 2, what="both workers connected")
    return serve


def finish_despite(serve: Serve, prompt: list[int], happens: Callable[[], object]) -> list[int]:
    """The tokens of a request whose prefill worker meets `happens` while it computes the prompt."""
    recomputes = serve.recomputes()
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(serve.tokens, prompt, 12)
        eventually(lambda: serve.metric("tandem_worker_pending_prefill_tokens", role="prefill") > 0, what="prefill")
        happens()
        tokens = answer.result(180)
    assert serve.recomputes() == recomputes + 1
    return tokens


def test_a_request_survives_the_death_of_its_prefill_worker(serve: Serve, prompt: MakePrompt) -> None:
    tokens = prompt(3000)
    survived = finish_despite(serve, tokens, lambda: serve.kill("prefill-0"))
    eventually(lambda: serve.metric("tandem_worker_up", role="prefill") == 1, what="prefill worker restarted")
    assert serve.tokens(tokens, 12) == survived


def test_a_request_survives_a_frozen_prefill_worker(serve: Serve, prompt: MakePrompt) -> None:
    tokens = prompt(3000)
    frozen = serve.children()["prefill-0"]
    try:
        survived = finish_despite(serve, tokens, lambda: frozen.send_signal(signal.SIGSTOP))
    finally:
        frozen.send_signal(signal.SIGCONT)
    eventually(lambda: serve.metric("tandem_worker_up", role="prefill") == 1, what="prefill worker is back")
    assert serve.tokens(tokens, 12) == survived


def test_without_prefill_workers_decode_does_it_all(serve: Serve, prompt: MakePrompt) -> None:
    tokens = prompt(64)
    expected = serve.tokens(tokens, 8)
    serve.kill("prefill-0")
    assert serve.tokens([*tokens[:-1], tokens[-1]], 8) == expected


def test_a_client_that_goes_away_frees_everything(serve: Serve, prompt: MakePrompt) -> None:
    events = serve.stream(prompt(600), 3000)
    next(events)
    assert serve.metric("tandem_worker_running", role="decode") == 1
    events.close()
    eventually(serve.idle, what="workers idle")
    eventually(serve.all_blocks_free, what="blocks free")


def test_a_client_that_leaves_during_prefill_frees_both_sides(serve: Serve, prompt: MakePrompt) -> None:
    patience = httpx.Timeout(60.0, read=0.3)
    with pytest.raises(httpx.ReadTimeout):
        serve.http.post("/v1/completions", json={"model": serve.model, "prompt": prompt(4000)}, timeout=patience)
    eventually(serve.idle, what="workers idle")
    eventually(serve.all_blocks_free, what="blocks free")
