"""A request of an earlier band takes a running one's place in the whole platform; a stream that yields only pauses."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.serving import Serve, eventually

MakePrompt = Callable[[int], list[int]]
SLOTS = 2
LENGTH = 200


@pytest.fixture(params=["unified", "disaggregated"])
def serve(serves: Callable[..., Serve], slow_model: Path, request: pytest.FixtureRequest) -> Serve:
    mode = ("--disaggregate", "always") if request.param == "disaggregated" else ("--prefill", "0")
    return serves(slow_model, *mode, "--dtype", "float32", "--max-num-seqs", SLOTS, "--max-num-batched-tokens", 64)


class Stream:
    """A streaming completion that is read by a thread."""

    def __init__(
        self, serve: Serve, prompt: list[int], max_tokens: int, headers: dict[str, str] | None = None, **fields: Any
    ) -> None:
        self.tokens: list[int] = []
        self.problem: BaseException | None = None
        self._events = serve.stream(prompt, max_tokens, headers, **fields)
        self._thread = threading.Thread(target=self._read)
        self._thread.start()

    def _read(self) -> None:
        try:
            for event in self._events:
                self.tokens += [token for choice in event["choices"] for token in choice.get("token_ids") or []]
        except BaseException as problem:
            self.problem = problem

    @property
    def going_on(self) -> bool:
        return self._thread.is_alive()

    def end(self) -> list[int]:
        self._thread.join()
        if self.problem is not None:
            raise self.problem
        return self.tokens


def displaced(serve: Serve) -> float:
    return serve.metric("tandem_router_preemptions_total", reason="priority")


def urge(serve: Serve, prompt: MakePrompt, unfinished: Callable[[], bool]) -> int:
    """Sends one urgent request after the other while there is batch work; a single one may meet a free place. Returns
    how many."""
    sent = 0
    while unfinished():
        assert len(serve.tokens(prompt(40), 4)) == 4
        sent += 1
    return sent


@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.8, "seed": 3}])
def test_an_urgent_request_displaces_and_nothing_is_lost(
    serve: Serve, prompt: MakePrompt, sampling: dict[str, Any]
) -> None:
    prompts = [prompt(40) for _ in range(SLOTS + 3)]  # more than the batch and what may wait before it
    alone = serve.tokens(prompts[0], LENGTH, **sampling)
    before = displaced(serve)
    streams = [Stream(serve, each, LENGTH, priority=5, **sampling) for each in prompts]
    eventually(lambda: sum(bool(stream.tokens) for stream in streams) >= SLOTS, 120, "a full batch")
    sent = urge(serve, prompt, lambda: any(stream.going_on for stream in streams))
    assert sent > 1, "the first did not wait for the others to end"
    assert displaced(serve) > before
    tokens = [stream.end() for stream in streams]
    assert all(len(each) == LENGTH for each in tokens)
    assert tokens[0] == alone


def test_explain_tells_who_had_to_yield(serve: Serve, prompt: MakePrompt) -> None:
    before = displaced(serve)
    streams = {
        name: Stream(serve, prompt(30), LENGTH, headers={"x-request-id": name}, priority=7)
        for name in (f"batch-{index}-{id(serve)}" for index in range(SLOTS + 3))
    }
    eventually(lambda: sum(bool(stream.tokens) for stream in streams.values()) >= SLOTS, 120, "a full batch")
    urge(serve, prompt, lambda: any(stream.going_on for stream in streams.values()))
    assert displaced(serve) > before
    for stream in streams.values():
        stream.end()
    accounts = [serve.http.get(f"/v1/requests/{name}").json() for name in streams]
    notes = [note for account in accounts for attempt in account["attempts"] for note in attempt.get("preemptions", ())]
    assert {note["reason"] for note in notes} == {"priority"}
    assert all(note["at_s"] > 0 for note in notes)
