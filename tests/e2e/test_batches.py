"""Batches of a real `tandem serve`: the same answers as direct requests, each prefix computed once, and kill -9."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.e2e.serving import Serve, eventually

MakePrompt = Callable[[int], list[int]]

ENDED = ("completed", "failed", "cancelled", "expired")
SHARED = 320


def line(custom_id: str, prompt: list[int], max_tokens: int) -> dict[str, Any]:
    body = {"prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
    return {"custom_id": custom_id, "method": "POST", "url": "/v1/completions", "body": body}


def create(serve: Serve, lines: list[dict[str, Any]]) -> str:
    content = "".join(json.dumps(each) + "\n" for each in lines).encode()
    file = serve.http.post("/v1/files", data={"purpose": "batch"}, files={"file": ("in.jsonl", content)}).json()
    body = {"input_file_id": file["id"], "endpoint": "/v1/completions", "completion_window": "24h"}
    batch_id: str = serve.http.post("/v1/batches", json=body).json()["id"]
    return batch_id


def look(serve: Serve, batch_id: str) -> dict[str, Any]:
    """{} while no router answers."""
    try:
        answer = serve.http.get(f"/v1/batches/{batch_id}")
    except httpx.TransportError:
        return {}
    found: dict[str, Any] = answer.json() if answer.status_code == 200 else {}
    return found


def ended(serve: Serve, batch_id: str, timeout_s: float = 200.0) -> dict[str, Any]:
    def found() -> dict[str, Any] | None:
        batch = look(serve, batch_id)
        return batch if batch.get("status") in ENDED else None

    batch: dict[str, Any] = eventually(found, timeout_s, "the batch ends")
    return batch


def answers(serve: Serve, batch: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Bodies by custom_id; each comes once."""
    rows = [
        json.loads(row) for row in serve.http.get(f"/v1/files/{batch['output_file_id']}/content").content.splitlines()
    ]
    found = {row["custom_id"]: row["response"]["body"] for row in rows}
    assert len(found) == len(rows)
    return found


def token_ids(body: dict[str, Any]) -> list[int]:
    tokens: list[int] = body["choices"][0]["token_ids"]
    return tokens


def cached(body: dict[str, Any]) -> int:
    tokens: int = body["usage"]["prompt_tokens_details"]["cached_tokens"]
    return tokens


def test_a_batch_computes_each_prefix_once_and_answers_as_clients_are_answered(
    tiny: Path, tmp_path: Path, prompt: MakePrompt
) -> None:
    with Serve(tiny, "--dtype", "float32", "--prefill", 0, TANDEM_STORAGE=str(tmp_path / "storage")) as serve:
        prefixes = [prompt(SHARED) for _ in range(3)]
        lines = [line(f"{g}-{i}", [*prefixes[g], *prompt(9)], 5) for i in range(6) for g in range(3)]
        batch = ended(serve, create(serve, lines))
        assert batch["request_counts"] == {"total": 18, "completed": 18, "failed": 0}
        found = answers(serve, batch)
        for g in range(3):
            missed = [name for name in found if name.startswith(f"{g}-") and cached(found[name]) < SHARED - 16]
            assert len(missed) == 1, "one request of a group computes its prefix"
        for each in lines:
            direct = serve.http.post("/v1/completions", json=each["body"]).json()
            assert token_ids(found[each["custom_id"]]) == token_ids(direct)


@pytest.mark.slow
def test_a_killed_router_goes_on_with_its_batch(slow_model: Path, tmp_path: Path, prompt: MakePrompt) -> None:
    """kill -9 in the middle, twice: no request is lost, none has two results, those with a result are not run again."""
    with Serve(slow_model, "--dtype", "float32", TANDEM_STORAGE=str(tmp_path / "storage")) as serve:
        lines = [line(str(i), prompt(40), 30) for i in range(120)]
        batch_id = create(serve, lines)
        kept: set[str] = set()
        for least in (20, 60):
            eventually(lambda: len(done(tmp_path)) >= least, 60, "some results")  # noqa: B023 - called at once
            serve.kill("router")
            after = done(tmp_path)
            assert kept <= after
            kept = after
            assert len(kept) < len(lines)
            eventually(lambda: look(serve, batch_id), 60, "a new router")
        batch = ended(serve, batch_id)
        assert batch["status"] == "completed"
        assert batch["request_counts"] == {"total": 120, "completed": 120, "failed": 0}
        found = answers(serve, batch)
        assert set(found) == {each["custom_id"] for each in lines}
        for each in lines[::10]:
            direct = serve.http.post("/v1/completions", json=each["body"]).json()
            assert token_ids(found[each["custom_id"]]) == token_ids(direct)


def done(folder: Path) -> set[str]:
    """custom_ids with a whole result on disk."""
    found: set[str] = set()
    for path in (folder / "storage" / "files").glob("file-*"):
        for row in path.read_bytes().splitlines(keepends=True):
            if row.endswith(b"\n") and b'"response"' in row:
                found.add(json.loads(row)["custom_id"])
    return found
