"""Named contexts of a real `tandem serve`: created, used, lost in every tier, computed again, dropped."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.serving import Serve, eventually

MakePrompt = Callable[[int], list[int]]

CHUNK = 64
LENGTH = 300
FULL = LENGTH // CHUNK * CHUNK


def restart(serve: Serve, *kinds: str, meanwhile: Callable[[], object] = lambda: None) -> None:
    """Kills processes, store node last, and waits until others took their places."""
    before = serve.children()
    doomed = {name: process.pid for name, process in before.items() if name.split("-")[0] in kinds}
    for name in sorted(doomed, key=lambda name: name == "kvstore"):
        serve.kill(name)
    meanwhile()

    def renewed() -> bool:
        now = serve.children()
        return all(name in now and now[name].pid != pid for name, pid in doomed.items())

    eventually(renewed, what="new processes")
    eventually(lambda: serve.metric("tandem_worker_up") == 2, 60, "all workers connected")
    eventually(lambda: serve.http.get("/v1/contexts").status_code == 200, what="the store node is back")


def answered(body: dict[str, Any]) -> list[int]:
    tokens: list[int] = body["choices"][0]["token_ids"]
    return tokens


def by_tier(body: dict[str, Any]) -> dict[str, int]:
    tiers: dict[str, int] = body["usage"]["prompt_tokens_details"].get("cached_tokens_by_tier", {})
    return tiers


def resident(serve: Serve) -> int:
    tokens: int = serve.http.get("/v1/contexts/manual").json()["resident_tokens"]
    return tokens


def objects(serve: Serve, tier: str) -> int:
    return sum(int(row.get("objects", 0)) for row in serve.store_stats()["tiers"] if row["tier"] == tier)


def hard_pins(serve: Serve, tier: str) -> int:
    return sum(int(row.get("hard_pins", 0)) for row in serve.store_stats()["tiers"] if row["tier"] == tier)


@pytest.mark.slow
def test_a_context_outlives_all_of_its_kv(tiny: Path, prompt: MakePrompt, tmp_path: Path) -> None:
    disk = tmp_path / "kv"
    flags = ("--dtype", "float32", "--disaggregate", "always", "--kv-chunk-tokens", CHUNK)
    with Serve(tiny, *flags, "--kv-disk", disk, "--kv-disk-bytes", 1 << 28) as serve:
        before, question = prompt(LENGTH), prompt(15)
        expected = serve.tokens(before + question, cache_salt="nobody has seen this")
        created = serve.http.post("/v1/contexts", json={"name": "manual", "prompt": before, "ttl_s": 600})
        assert created.status_code == 200, created.text
        context = created.json()
        assert (context["version"], context["tokens"], context["resident_tokens"]) == (1, LENGTH, FULL)

        first = serve.complete(question, context="manual")
        assert answered(first) == expected
        assert first["usage"]["prompt_tokens"] == LENGTH + 15
        assert sum(by_tier(first).values()) >= FULL
        eventually(lambda: hard_pins(serve, "host") == FULL // CHUNK, what="pinned in host memory")

        # Processes die; KV and recipe are on disk.
        eventually(lambda: objects(serve, "disk") >= objects(serve, "host") > 0, what="everything written back")
        restart(serve, "prefill", "decode", "kvstore")
        eventually(lambda: hard_pins(serve, "disk") == FULL // CHUNK, what="pinned on disk")
        again = serve.complete(question, context="manual")
        assert answered(again) == expected
        assert by_tier(again) == {"disk": FULL}

        # All KV is lost, the recipe is not.
        def lose_kv() -> None:
            for path in disk.iterdir():
                if path.is_file() and path.name != "lock":
                    path.unlink()

        restart(serve, "prefill", "decode", "kvstore", meanwhile=lose_kv)
        assert resident(serve) == 0
        recomputed = serve.complete(question, context="manual")
        assert answered(recomputed) == expected
        assert by_tier(recomputed) == {}
        eventually(lambda: resident(serve) == FULL, what="saved again")
        eventually(lambda: hard_pins(serve, "host") == FULL // CHUNK, what="pinned again")

        assert serve.http.delete("/v1/contexts/manual").status_code == 200
        assert hard_pins(serve, "host") == 0
        gone = serve.http.post("/v1/completions", json={"prompt": question, "context": "manual"})
        assert (gone.status_code, gone.json()["error"]["param"]) == (404, "context")
        assert list((disk / "contexts").iterdir()) == []
