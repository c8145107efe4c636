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
        serve.http.headers["x-tandem-explain"] = "1"
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

        eventually(renewed, what="new processes")
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


def computed_by(body: dict[str, Any]) -> str:
    worker: str = body["explain"]["attempts"][-1]["computed_by"]
    return worker


def test_one_prefill_workers_text_is_a_hit_for_the_other(serve: Serve, prompt: MakePrompt) -> None:
    """The router sends a prompt to where it is cached, so the other worker gets it once that one is gone."""

    def other_has_loaded_it() -> bool:
        tokens = prompt(300)
        first = serve.complete(tokens)
        assert by_tier(first) == {}
        serve.kill(computed_by(first))
        eventually(lambda: serve.metric("tandem_worker_up") < 4, what="the loss noticed")
        again = serve.complete(tokens)
        assert answered(again) == answered(first)
        eventually(lambda: serve.metric("tandem_worker_up") == 4, 60, "all workers connected")
        return computed_by(again) != computed_by(first) and by_tier(again) == {"host": 256}

    eventually(other_has_loaded_it, 60, "text of one prefill worker loaded by the other")


def test_killed_workers_find_prompts_and_answers_again(
    serve: Serve, prompt: MakePrompt, restart: Callable[..., None]
) -> None:
    prompts = [prompt(300)]
    # What the answer of a turn fills was computed by a decode worker alone, and is the prefix of the next turn.
    first_turn = prompt(100)
    prompts.append([*first_turn, *serve.tokens(first_turn, 150), *prompt(20)])
    computed = [serve.complete(tokens, cache_salt="nobody has seen this") for tokens in prompts]
    assert all(by_tier(body) == {} for body in computed)
    serve.complete(prompts[0])
    loads_after(lambda: restart("prefill", "decode"), serve, prompts, computed, "host", [300, 249])


def test_disk_survives_the_store_node(serve: Serve, prompt: MakePrompt, restart: Callable[..., None]) -> None:
    tokens = prompt(300)
    computed = serve.complete(tokens)
    eventually(lambda: objects(serve, "disk") >= objects(serve, "host") > 0, what="everything written back")
    loads_after(lambda: restart("kvstore", "prefill", "decode"), serve, [tokens], [computed], "disk", [300])


def loads_after(
    happens: Callable[[], None],
    serve: Serve,
    prompts: list[list[int]],
    computed: list[dict[str, Any]],
    tier: str,
    known: list[int],
) -> None:
    """After `happens` the whole chunks of the first `known` tokens of each prompt come from `tier`, and the answers are
    the computed ones. A machine that is too busy for a look-up in time may compute: then once more."""
    expected = [{tier: tokens // CHUNK * CHUNK} for tokens in known]
    for _ in range(3):
        happens()
        loaded = [serve.complete(tokens) for tokens in prompts]
        assert [answered(body) for body in loaded] == [answered(body) for body in computed]
        if [by_tier(body) for body in loaded] == expected:
            return
    assert [by_tier(body) for body in loaded] == expected


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
    eventually(lambda: "kvstore" in serve.children())
    assert [serve.tokens(tokens) for tokens in prompts] == expected
    eventually(serve.idle)
