"""How requests end: refused, cancelled, out of time, failed, shut down. Always one last output, all blocks back."""

from __future__ import annotations

import random
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from tandem.common.errors import TandemError
from tandem.engine.request import EngineRequest, FinishReason, RequestKey
from tests.engine_harness import TIMEOUT_S, EngineUnderTest, SamplingParams, wait_for

PROMPT = [(i * 13) % 500 + 3 for i in range(100)]


@pytest.mark.parametrize(
    ("prompt", "options", "code", "names"),
    [
        ([], {}, "invalid_request", "prompt"),
        ([1, 512], {}, "invalid_request", "prompt"),
        ([1, -1], {}, "invalid_request", "prompt"),
        ([1] * 1024, {}, "context_length_exceeded", "1024"),
        ([1], {"logit_bias": {600: 1.0}}, "invalid_request", "logit_bias"),
        ([1], {"allowed_token_ids": (600,)}, "invalid_request", "allowed_token_ids"),
    ],
)
def test_what_cannot_be_served_is_refused_and_harms_nobody(
    engine: EngineUnderTest, prompt: list[int], options: dict[str, Any], code: str, names: str
) -> None:
    good = engine.submit("good", PROMPT, max_tokens=20)
    last = engine.last(engine.submit("bad", prompt, **options))
    assert last.finish_reason is FinishReason.ERROR
    assert last.error_code == code
    assert names in last.error_message
    assert len(engine.tokens(good)) == 20


def test_more_than_the_queue_holds_is_overload(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tandem.engine.engine.MAX_WAITING", 2)
    with EngineUnderTest(folder, max_num_seqs=1) as engine:
        first = engine.submit("first", PROMPT, max_tokens=400)
        engine.wait_tokens(first, 1)
        keys = [engine.submit(f"r{i}", PROMPT, max_tokens=2) for i in range(6)]
        wait_for(lambda: sum(engine.ended(key) for key in keys) >= 4)
        engine.engine.cancel(first)
        codes = [engine.last(key).error_code for key in keys]
        assert codes == ["", "", *["overloaded"] * 4]


@pytest.mark.parametrize("tokens", [0, 1, 5])
def test_cancel_frees_everything_at_any_time(
    engine: EngineUnderTest, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine.slow_down(monkeypatch)
    key = engine.submit("a", PROMPT, max_tokens=900)
    engine.wait_tokens(key, tokens)
    engine.engine.cancel(key)
    assert engine.last(key).finish_reason is FinishReason.CANCELLED
    engine.check_all_free()
    engine.engine.cancel(key)
    engine.engine.cancel(RequestKey("never seen", 0))


def test_cancel_while_waiting(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with EngineUnderTest(folder, max_num_seqs=1) as engine:
        engine.slow_down(monkeypatch)
        first = engine.submit("first", PROMPT, max_tokens=900)
        waiting = engine.submit("waiting", PROMPT)
        engine.wait_tokens(first, 1)
        engine.engine.cancel(waiting)
        assert engine.last(waiting).finish_reason is FinishReason.CANCELLED
        engine.engine.cancel(first)


@pytest.mark.parametrize("where", ["waiting", "running", "submitted too late"])
def test_deadlines(folder: Path, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with EngineUnderTest(folder, max_num_seqs=1) as engine:
        engine.slow_down(monkeypatch)
        blocker = engine.submit("blocker", PROMPT, max_tokens=900) if where == "waiting" else None
        delay = -1.0 if where == "submitted too late" else TIMEOUT_S
        key = engine.submit("a", PROMPT, max_tokens=900, deadline=time.monotonic() + delay)
        if where == "running":
            engine.wait_tokens(key, 1)
        engine.expire(key)
        last = engine.last(key)
        assert last.finish_reason is FinishReason.ERROR
        assert last.error_code == "deadline_exceeded"
        assert last.start_index == len(engine.tokens_so_far(key))
        assert bool(engine.tokens_so_far(key)) == (where == "running")
        if blocker is not None:
            engine.engine.cancel(blocker)


def test_a_key_in_use_is_refused_and_free_again_afterwards(engine: EngineUnderTest) -> None:
    key = engine.submit("a", PROMPT, max_tokens=900)
    with pytest.raises(TandemError) as refusal:
        engine.submit("a", PROMPT)
    assert refusal.value.code == "invalid_request"
    engine.engine.cancel(key)
    engine.last(key)
    engine.outputs.clear()
    assert engine.generate("a", PROMPT)


def test_a_receiver_that_raises_does_not_stop_the_engine(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with EngineUnderTest(folder) as engine:
        collect, engine.engine._outputs.receive = engine.engine._outputs.receive, lambda outputs: 1 / 0
        engine.submit("lost", PROMPT, max_tokens=2)
        engine.check_all_free()
        engine.engine._outputs.receive = collect
        assert engine.generate("seen", PROMPT)
    assert "the receiver of outputs failed" in caplog.text


def test_stop_ends_everything_with_unavailable(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = EngineUnderTest(folder, max_num_seqs=2)
    engine.slow_down(monkeypatch)
    engine.engine.start()
    keys = [engine.submit(f"r{i}", PROMPT, max_tokens=900) for i in range(4)]
    engine.wait_tokens(keys[0], 1)
    assert engine.engine.stop(60.0)
    assert [engine.last(key).error_code for key in keys] == ["unavailable"] * 4
    assert engine.engine.status().free_blocks == engine.engine.status().total_blocks
    engine.engine.check_integrity()
    with pytest.raises(TandemError) as refusal:
        engine.submit("late", PROMPT)
    assert refusal.value.code == "unavailable"


def test_stop_before_start_ends_what_was_queued(folder: Path) -> None:
    engine = EngineUnderTest(folder)
    key = engine.submit("a", PROMPT)
    assert engine.engine.stop(1.0)
    assert engine.last(key).error_code == "unavailable"


def test_a_malformed_request_harms_nobody(engine: EngineUnderTest) -> None:
    good = engine.submit("good", PROMPT, max_tokens=30)
    bad = engine.submit("bad", ["not a token"])  # type: ignore[list-item]
    assert engine.last(bad).error_code == "internal"
    assert len(engine.tokens(good)) == 30


def test_a_defect_outside_the_steps_ends_what_runs_and_the_engine_goes_on(
    engine: EngineUnderTest, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine.slow_down(monkeypatch)
    key = engine.submit("a", PROMPT, max_tokens=900)
    engine.wait_tokens(key, 1)
    with monkeypatch.context() as patch:
        patch.setattr(engine.engine.scheduler, "schedule", lambda now: 1 / 0)
        assert engine.last(key).error_code == "internal"
    assert engine.generate("b", PROMPT)


def test_an_idle_engine_sleeps(folder: Path) -> None:
    with EngineUnderTest(folder) as engine:
        engine.generate("a", PROMPT)
        schedule, calls = engine.engine.scheduler.schedule, 0

        def counting(now: float) -> Any:
            nonlocal calls
            calls += 1
            return schedule(now)

        engine.engine.scheduler.schedule = counting  # type: ignore[method-assign]
        engine.engine.check_integrity()
        engine.engine.check_integrity()
        assert calls <= 3, "it wakes for messages only"


@pytest.mark.parametrize("seed", [1, 2])
def test_a_soak_with_random_cancels_leaves_nothing_behind(folder: Path, seed: int) -> None:
    rng = random.Random(seed)
    block_bytes = 2 * 3 * 16 * 32 * 4
    options = {
        "kv_cache_bytes": 40 * block_bytes,
        "max_model_len": 200,
        "max_num_seqs": 6,
        "max_num_batched_tokens": 64,
    }
    with EngineUnderTest(folder, **options) as engine:
        prompts = [[rng.randrange(3, 500) for _ in range(120)] for _ in range(4)]
        keys: list[RequestKey] = []
        for index in range(300):
            key = RequestKey(f"r{index}", 0)
            sampling = SamplingParams(
                max_tokens=rng.randint(1, 16),
                temperature=rng.choice((0.0, 1.0)),
                top_p=rng.choice((1.0, 0.9)),
                presence_penalty=rng.choice((0.0, 0.0, 1.0)),
                logprobs=rng.choice((None, None, 2)),
                prompt_logprobs=rng.choice((None, None, None, None, 1)),
            )
            deadline = time.monotonic() + rng.random() if rng.random() < 0.1 else None
            prompt = rng.choice(prompts)[: rng.randint(1, 120)]
            engine.engine.submit(
                EngineRequest(key, prompt, sampling, rng.randint(0, 2), deadline, rng.choice((b"", b"x")))
            )
            keys.append(key)
            if rng.random() < 0.2:
                engine.engine.cancel(rng.choice(keys))
            if index % 25 == 0:
                engine.engine.check_integrity()
        reasons = [engine.last(key).finish_reason for key in keys]
        assert reasons.count(FinishReason.CANCELLED) > 5
        assert not [key for key in keys if engine.last(key).error_code not in ("", "deadline_exceeded")]


def test_an_engine_that_hangs_in_a_layer_shows_it_and_one_that_waits_does_not(
    engine: EngineUnderTest, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on = threading.Event()
    decoder = engine.engine.loaded.decoder
    attend = decoder._attention.attend

    def hang(*arguments: Any) -> Any:
        go_on.wait(TIMEOUT_S)
        return attend(*arguments)

    assert engine.engine.stalled_s == 0.0
    monkeypatch.setattr(decoder._attention, "attend", hang)
    key = engine.submit("stuck", PROMPT, max_tokens=4)
    wait_for(lambda: engine.engine.stalled_s > 0.2)
    go_on.set()
    assert len(engine.tokens(key)) == 4
    wait_for(lambda: engine.engine.stalled_s == 0.0)
