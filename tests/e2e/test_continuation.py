"""Decode workers are killed under load: every client gets its whole answer, the one it gets when nobody dies."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.serving import KINDS, Askers, Serve, ask, eventually

MakePrompt = Callable[[int], list[int]]
Question = dict[str, Any]


@pytest.fixture(scope="module")
def serve(tiny: Path) -> Iterator[Serve]:
    """Streams wait for a worker for as long as a busy machine may need to start one."""
    flags = ("--prefill", 2, "--decode", 2, "--disaggregate", "always", "--dtype", "float32")
    with Serve(tiny, *flags, TANDEM_WORKER_WAIT_S="180") as running:
        yield running


def questions(prompt: MakePrompt) -> list[Question]:
    """Of all `KINDS`; short and long."""
    return [{"prompt": prompt(20 + 37 * i), "max_tokens": 150} | KINDS[i % len(KINDS)] for i in range(10)]


class Clients(Askers):
    """Half of them streaming."""

    def __init__(self, serve: Serve, asked: list[Question], count: int = 8) -> None:
        super().__init__(count)
        self._serve = serve
        self._asked = asked
        self._expected = [ask(serve.http, serve.model, question, stream=False) for question in asked]

    def kill(self, worker: str) -> None:
        """In the middle of a request."""
        eventually(lambda: self._serve.metric("tandem_worker_running", worker=worker) > 0, 90, f"{worker} busy")
        self._serve.kill(worker)

    def disturb(self, worker: str) -> None:
        """Kills it until somebody was in the middle of an answer, which a kill may just miss."""

        def disturbed() -> bool:
            if self._serve.metric("tandem_router_retries_total") > 0:
                return True
            self.kill(worker)
            self.wait(16)
            return False

        eventually(disturbed, what="a request that is done again")

    def _run(self, number: int) -> None:
        generator = random.Random(number)
        while not self._stopping.is_set():
            index = generator.randrange(len(self._asked))
            try:
                got = ask(self._serve.http, self._serve.model, self._asked[index], stream=number % 2 == 0)
                if got != self._expected[index]:
                    self.wrong.append(f"{self._asked[index]}: {got} instead of {self._expected[index]}")
            except Exception as error:
                self.wrong.append(repr(error))
            self.answered += 1


def test_no_token_is_lost_or_doubled_when_workers_are_killed(serve: Serve, prompt: MakePrompt) -> None:
    with Clients(serve, questions(prompt)) as clients:
        clients.wait(4)
        for victim in ("decode-0", "prefill-1"):
            clients.kill(victim)
            clients.wait(16)
        clients.disturb("decode-0")
    eventually(serve.idle, what="workers idle")


def test_a_stream_outlives_all_decode_workers(serve: Serve, prompt: MakePrompt) -> None:
    question = {"prompt": prompt(40), "max_tokens": 300}
    ((_, expected, _),) = ask(serve.http, serve.model, question, stream=False)
    serve.wait_connected(4)
    events = serve.stream(question["prompt"], question["max_tokens"])
    seen = [next(events)]
    serve.kill("decode-0")
    serve.kill("decode-1")
    seen += events
    assert not [event for event in seen if "error" in event], seen[-1]
    assert [token for event in seen for token in event["choices"][0].get("token_ids") or ()] == expected
    assert any("decode-0 was killed by SIGKILL" in line for line in serve.log)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_no_token_is_lost_or_doubled_when_every_worker_is_killed_in_turn(serve: Serve, prompt: MakePrompt) -> None:
    with Clients(serve, questions(prompt)) as clients:
        for victim in ("decode-0", "decode-1", "prefill-0", "decode-0", "prefill-1", "decode-1"):
            serve.wait_connected(4)
            clients.kill(victim)
            eventually(lambda: serve.metric("tandem_worker_up") < 4, what=f"{victim} gone")
            clients.wait(8)
    eventually(serve.idle, what="workers idle")


def test_in_batch_invariant_mode_a_killed_worker_changes_no_text(tiny: Path, prompt: MakePrompt) -> None:
    """Greedy, in bfloat16, where two candidates are close often enough: the bits are the same in any batch."""
    flags = ("--prefill", 0, "--decode", 2, "--dtype", "bfloat16", "--batch-invariant", "true")
    with Serve(tiny, *flags, TANDEM_WORKER_WAIT_S="180") as serve:
        workers = serve.http.get("/readyz").json()["workers"]
        assert [worker["row_invariant"] for worker in workers] == [True, True]
        asked: list[Question] = [{"prompt": prompt(20 + 29 * i), "max_tokens": 200} for i in range(8)]
        with Clients(serve, asked) as clients:
            for victim in ("decode-0", "decode-1"):
                serve.wait_connected(2)
                clients.kill(victim)
                eventually(lambda: serve.metric("tandem_worker_up") < 2, what=f"{victim} gone")
                clients.wait(12)
            clients.disturb("decode-0")
