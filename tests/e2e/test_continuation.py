"""Decode workers are killed under load: every client gets its whole answer, the one it gets when nobody dies."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.serving import Serve, ask, eventually

MakePrompt = Callable[[int], list[int]]
Question = dict[str, Any]


@pytest.fixture(scope="module")
def serve(tiny: Path) -> Iterator[Serve]:
    """Streams wait for a worker for as long as a busy machine may need to start one."""
    flags = ("--prefill", 2, "--decode", 2, "--disaggregate", "always", "--dtype", "float32")
    with Serve(tiny, *flags, TANDEM_WORKER_WAIT_S="180") as running:
        yield running


def questions(prompt: MakePrompt) -> list[Question]:
    """Greedy, drawn, penalised, stopped by a string, scored; short and long."""
    kinds: list[dict[str, Any]] = [
        {},
        {"temperature": 0.9, "seed": 5, "top_p": 0.9},
        {"temperature": 0.7, "seed": 6, "presence_penalty": 0.8, "repetition_penalty": 1.1},
        {"logprobs": 1},
        {"temperature": 0.8, "n": 2, "seed": 7},
    ]
    return [{"prompt": prompt(20 + 37 * i), "max_tokens": 150} | kinds[i % len(kinds)] for i in range(10)]


class Clients:
    """Ask without a pause, each answer compared. The `with` block ends when the last answer is there, and fails if one
    was missing or wrong."""

    def __init__(self, serve: Serve, asked: list[Question], count: int = 8) -> None:
        self.answered = 0
        self._serve = serve
        self._asked = asked
        self._expected = [ask(serve.http, serve.model, question, stream=False) for question in asked]
        self._wrong: list[str] = []
        self._stopping = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(i,), daemon=True) for i in range(count)]

    def __enter__(self) -> Clients:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        for thread in self._threads:
            thread.join(90.0)
        assert not any(thread.is_alive() for thread in self._threads)
        assert not self._wrong, f"{len(self._wrong)} of {self.answered}: {self._wrong[:3]}"

    def wait(self, answers: int) -> None:
        """For so many more."""
        goal = self.answered + answers
        eventually(lambda: self.answered >= goal or self._wrong, 90, f"{answers} more answers")

    def kill(self, worker: str) -> None:
        """In the middle of a request."""
        eventually(lambda: self._serve.metric("tandem_worker_running", worker=worker) > 0, 90, f"{worker} busy")
        self._serve.kill(worker)

    def _run(self, number: int) -> None:
        generator = random.Random(number)
        while not self._stopping.is_set():
            index = generator.randrange(len(self._asked))
            try:
                got = ask(self._serve.http, self._serve.model, self._asked[index], stream=number % 2 == 0)
                if got != self._expected[index]:
                    self._wrong.append(f"{self._asked[index]}: {got} instead of {self._expected[index]}")
            except Exception as error:
                self._wrong.append(repr(error))
            self.answered += 1


def test_no_token_is_lost_or_doubled_when_workers_are_killed(serve: Serve, prompt: MakePrompt) -> None:
    with Clients(serve, questions(prompt)) as clients:
        clients.wait(4)
        for victim in ("decode-0", "prefill-1"):
            clients.kill(victim)
            clients.wait(16)
    assert serve.metric("tandem_router_retries_total") > 0, "somebody was in the middle of it"
    eventually(serve.idle, 10, "workers idle")


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
            eventually(lambda: serve.metric("tandem_worker_up") < 4, 30, f"{victim} gone")
            clients.wait(8)
    eventually(serve.idle, 10, "workers idle")
