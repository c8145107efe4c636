"""A router with a batch lane before scripted workers."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest

from tandem.router.app import Router
from tandem.router.batch.lane import BatchLane
from tandem.router.tenants.caller import ANYBODY, Caller
from tests.router.conftest import House
from tests.router.fake_worker import FakeWorker

ENDED = ("completed", "failed", "cancelled", "expired")


class Desk:
    """A router with a lane, and what its clients do."""

    def __init__(self, router: Router, lane: BatchLane, http: httpx.AsyncClient) -> None:
        self.router = router
        self.lane = lane
        self.http = http

    async def upload(self, content: bytes, **fields: Any) -> httpx.Response:
        files = {"file": ("input.jsonl", content)}
        return await self.http.post("/v1/files", data={"purpose": "batch", **fields}, files=files)

    async def create(self, lines: list[dict[str, Any]], endpoint: str = "/v1/completions", **fields: Any) -> str:
        """Id of a new batch with these lines."""
        content = b"".join(json.dumps(line).encode() + b"\n" for line in lines)
        file_id = (await self.upload(content)).json()["id"]
        body = {"input_file_id": file_id, "endpoint": endpoint, "completion_window": "24h", **fields}
        answer = await self.http.post("/v1/batches", json=body)
        assert answer.status_code == 200, answer.text
        batch_id: str = answer.json()["id"]
        return batch_id

    async def batch(self, batch_id: str) -> dict[str, Any]:
        found: dict[str, Any] = (await self.http.get(f"/v1/batches/{batch_id}")).json()
        return found

    async def ended(self, batch_id: str) -> dict[str, Any]:
        return await self.reached(batch_id, *ENDED)

    async def reached(self, batch_id: str, *statuses: str) -> dict[str, Any]:
        return await self._polled(batch_id, lambda batch: batch["status"] in statuses)

    async def progressed(self, batch_id: str, completed: int) -> dict[str, Any]:
        return await self._polled(batch_id, lambda batch: batch["request_counts"]["completed"] >= completed)

    async def _polled(self, batch_id: str, condition: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        deadline = time.monotonic() + 20.0
        while not condition(batch := await self.batch(batch_id)):
            assert time.monotonic() < deadline, batch
            await asyncio.sleep(0.01)
        return batch

    async def rows(self, file_id: str | None) -> dict[str, dict[str, Any]]:
        """A result file by custom_id; every one comes once."""
        if file_id is None:
            return {}
        content = (await self.http.get(f"/v1/files/{file_id}/content")).content
        rows = [json.loads(row) for row in content.splitlines()]
        found = {row["custom_id"]: row for row in rows}
        assert len(found) == len(rows)
        return found

    async def results(self, batch: dict[str, Any]) -> tuple[dict[str, dict[str, Any]], dict[str, dict[str, Any]]]:
        return await self.rows(batch["output_file_id"]), await self.rows(batch["error_file_id"])


OpenDesk = Callable[..., Awaitable[Desk]]


@pytest.fixture
async def desk(house: House, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[OpenDesk]:
    """desk(worker, ...): one more router on the same storage."""
    monkeypatch.setattr("tandem.router.batch.lane.POLL_S", 0.05)
    monkeypatch.setattr("tandem.router.batch.run.MAX_PAUSE_S", 0.05)
    async with AsyncExitStack() as stack:

        async def open_desk(
            *workers: FakeWorker,
            caller_of: Callable[[str], Caller | None] = {"default": ANYBODY}.get,
            room: Callable[[int], bool] = lambda tokens: True,
            **settings: Any,
        ) -> Desk:
            router = await house.router(*workers, **settings)
            lane = BatchLane(tmp_path / "storage", router.service, caller_of=caller_of, room=room)
            router.service.batches = lane
            lane.start()
            stack.push_async_callback(lane.stop)
            return Desk(router, lane, await house.client(router))

        yield open_desk


def completion(custom_id: str, prompt: Any = "Hello world", **fields: Any) -> dict[str, Any]:
    body = {"prompt": prompt, "max_tokens": 4, "temperature": 0, **fields}
    return {"custom_id": custom_id, "method": "POST", "url": "/v1/completions", "body": body}
