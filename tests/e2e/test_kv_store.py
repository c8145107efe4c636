"""Text that any worker has seen is not computed twice, whatever died in between; a failing store costs time only.

Greedy answers are compared with the ones given before anything was cached.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.serving import Serve, eventually

MakePrompt = Callable[[int], list[int]]

CHUNK = 64


@pytest.fixture(scope="module")
def serve(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serve]:
    disk = tmp_path_factory.mktemp("kv")
    flags = ("--dtype", "float32", "--disaggregate", "always", "--kv-chunk-tokens", CHUNK)
    with Serve(tiny, "--prefill", 2, "--decode", 2, *flags, "--kv-disk", disk, "--kv-disk-bytes", 1 << 28) as serve:
        yield serve


@pytest.fixture
def restart(serve: Serve) -> Callable[..., None]:
    """Kills processes and waits until others took their places."""

    def kill(*kinds: str) -> None:
        before = serve.children()
        doomed = {name: process.pid for name, process in before.items() if name.split("-")[0] in kinds}
        for name in doomed:
            serve.kill(name)

        def renewed() -> bool:
            now = serve.children()
            return all(name in now and now[name].pid != pid for name, pid in doomed.items())

        eventually(renewed, 30, "new processes")
        eventually(lambda: serve.metric("tandem_worker_up") == 4, 60, "all workers connected")

    return kill


def answered(body: dict[str, Any]) -> list[int]:
    tokens: list[int] = body["choices"][0]["token_ids"]
    return tokens


def by_tier(body: dict[str, Any]) -> dict[str, int]:
    tiers: dict[str, int] = body["usage"]["prompt_tokens_details"].get("cached_tokens_by_tier", {})
    return tiers


def objects(serve: Serve, tier: str) -> int:
    return sum(int(row.get("objects", 0)) for row in serve.store_stats()["tiers"] if row["tier"].lower().endswith(tier))


def in_memory(serve: Serve) -> int:
    return objects(serve, "host")


def on_disk(serve: Serve) -> int:
    return objects(serve, "disk")


def test_one_prefill_workers_text_is_a_hit_for_the_other(serve: Serve, prompt: MakePrompt) -> None:
    tokens = prompt(300)
    first = serve.complete(tokens)
    assert by_tier(first) == {}
    seen: set[str] = set()

    def both_have_had_it() -> bool:
        again = serve.complete(tokens)
        assert answered(again) == answered(first)
        seen.update(by_tier(again))
        return {"device", "host"} <= seen

    eventually(both_have_had_it, 20, "hits on the device of one worker and in the store for the other")


def test_workers_that_were_killed_find_their_text_again(
    serve: Serve, prompt: MakePrompt, restart: Callable[..., None]
) -> None:
    tokens = prompt(300)
    first = serve.complete(tokens)
    restart("prefill", "decode")
    again = serve.complete(tokens)
    assert answered(again) == answered(first)
    assert by_tier(again) == {"host": 300 // CHUNK * CHUNK}


def test_a_turns_answer_is_the_next_turns_prefix(
    serve: Serve, prompt: MakePrompt, restart: Callable[..., None]
) -> None:
    tokens = prompt(100)
    turn = [*tokens, *serve.tokens(tokens, 150), *prompt(20)]
    # What the answer filled was computed by a decode worker alone.
    computed = serve.complete(turn, cache_salt="nobody has seen this")
    assert by_tier(computed) == {}
    restart("prefill", "decode")
    loaded = serve.complete(turn)
    assert answered(loaded) == answered(computed)
    assert by_tier(loaded) == {"host": 249 // CHUNK * CHUNK}


def test_disk_survives_the_store_node(serve: Serve, prompt: MakePrompt, restart: Callable[..., None]) -> None:
    tokens = prompt(300)
    first = serve.complete(tokens)
    eventually(lambda: on_disk(serve) >= in_memory(serve) > 0, 20, "everything written back")
    restart("kvstore", "prefill", "decode")
    again = serve.complete(tokens)
    assert answered(again) == answered(first)
    assert by_tier(again) == {"disk": 300 // CHUNK * CHUNK}


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_store_that_goes_away_fails_nobody(serve: Serve, prompt: MakePrompt, number: signal.Signals) -> None:
    shared = prompt(200)
    prompts = [shared + prompt(60) for _ in range(12)]
    expected = [serve.tokens(tokens) for tokens in prompts]
    store = serve.children()["kvstore"]
    with ThreadPoolExecutor(4) as pool:
        answers = [pool.submit(serve.tokens, tokens) for tokens in prompts]
        eventually(lambda: any(answer.done() for answer in answers))
        store.send_signal(number)
        try:
            assert [answer.result(60) for answer in answers] == expected
            assert serve.tokens(prompts[0] + prompt(40))
        finally:
            if number is signal.SIGSTOP:
                store.send_signal(signal.SIGCONT)
    eventually(lambda: "kvstore" in serve.children(), 30)
    assert [serve.tokens(tokens) for tokens in prompts] == expected
    eventually(serve.idle)
