"""Several router processes on one port: all serve, each answers for all, and a killed one comes back."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import socket

import httpx
import psutil
import pytest

from tests.router.conftest import House, until
from tests.router.fake_worker import FakeWorker, Script
from tests.router.test_router_process import Process, closed, start

UP = re.compile(rb'^tandem_worker_up\{.*process="router-(\d)".*\} 1\.0$', re.MULTILINE)


async def get(router: Process, path: str) -> httpx.Response:
    """Over a connection of its own, which may reach any router."""
    async with httpx.AsyncClient(base_url=router.url, trust_env=False, timeout=60) as client:
        return await client.get(path)


async def routers_up(router: Process) -> set[bytes]:
    try:
        return set(UP.findall((await get(router, "/metrics")).content))
    except httpx.TransportError:
        return set()


async def all_up(router: Process, count: int) -> None:
    async with asyncio.timeout(30):
        while len(await routers_up(router)) < count:  # noqa: ASYNC110  # another process tells no event
            await asyncio.sleep(0.05)


async def stop(router: Process) -> None:
    if router.process.returncode is None:
        router.process.kill()
        await router.process.wait()


async def test_every_router_serves_and_answers_for_all(house: House) -> None:
    worker = await house.decode()
    router = await start(worker, house.model, "--routers=2")
    try:
        assert "2 routers" in await router.line()
        await all_up(router, 2)
        ids = [f"request-{i}" for i in range(16)]
        for request_id in ids:
            async with httpx.AsyncClient(base_url=router.url, trust_env=False, timeout=60) as client:
                body = {"prompt": "Hello", "max_tokens": 3}
                response = await client.post("/v1/completions", json=body, headers={"x-request-id": request_id})
                assert response.status_code == 200
        routers = {submit.key.request_id.split(".")[1][:8] for submit in worker.submits}
        assert len(routers) == 2, "one router took every connection"
        for request_id in ids:
            account = (await get(router, f"/v1/requests/{request_id}")).json()
            assert account["id"] == request_id
            assert account["outcome"] == "ok"
            assert account["attempts"][0]["decode"] == "decode-0"
        assert (await get(router, "/v1/requests/nobody-sent-this")).status_code == 404
        os.kill(router.process.pid, signal.SIGTERM)
        await closed(router.url)
        assert await asyncio.wait_for(router.process.wait(), 10) == 0
    finally:
        await stop(router)


def routers_of(router: Process) -> dict[str, psutil.Process]:
    found = {}
    for child in psutil.Process(router.process.pid).children():
        with contextlib.suppress(psutil.Error):
            if (name := re.search(r"/(router-\d)\.yaml", " ".join(child.cmdline()))) is not None:
                found[name.group(1)] = child
    return found


async def test_a_killed_router_comes_back_and_nobody_is_refused(house: House) -> None:
    router = await start(await house.decode(), house.model, "--routers=2")
    try:
        await router.line()
        await all_up(router, 2)
        before = routers_of(router)
        assert set(before) == {"router-0", "router-1"}
        for name in before:
            before[name].kill()
        for _ in range(20):  # those that come before a router is back wait for it
            assert (await get(router, "/healthz")).status_code == 200
        await all_up(router, 2)
        assert {child.pid for child in routers_of(router).values()}.isdisjoint(child.pid for child in before.values())
        children = psutil.Process(router.process.pid).children(recursive=True)
        router.process.kill()
        await until(lambda: not any(child.is_running() for child in children), 15)
    finally:
        await stop(router)


@pytest.mark.parametrize("stream", [False, True])
async def test_nobody_takes_what_a_killed_router_sent_for_a_whole_answer(house: House, stream: bool) -> None:
    worker = await house.decode(script=Script(hold_after=2))
    router = await start(worker, house.model, "--routers=2")
    try:
        await router.line()
        await all_up(router, 2)
        async with httpx.AsyncClient(base_url=router.url, trust_env=False, timeout=60) as client:
            body = {"prompt": "Hello", "max_tokens": 9, "stream": stream}
            received: list[str] = []

            async def ask() -> None:
                async with client.stream("POST", "/v1/completions", json=body) as answer:
                    async for line in answer.aiter_lines():
                        received.append(line)

            asking = asyncio.create_task(ask())
            await until(lambda: len(worker.submits) > 0 and (bool(received) or not stream))
            for child in routers_of(router).values():
                child.kill()
            with pytest.raises(httpx.TransportError):
                await asking
            assert "data: [DONE]" not in received
    finally:
        await stop(router)


async def test_new_connections_do_not_wait_for_a_router_that_hangs(house: House) -> None:
    router = await start(await house.decode(), house.model, "--routers=2")
    try:
        await router.line()
        await all_up(router, 2)
        hung = routers_of(router)["router-0"]
        hung.suspend()
        for _ in range(20):
            assert (await get(router, "/healthz")).status_code == 200
        await until(lambda: not hung.is_running(), 90)
        await all_up(router, 2)
        routers_of(router)["router-1"].suspend()
        os.kill(router.process.pid, signal.SIGTERM)
        assert await asyncio.wait_for(router.process.wait(), 25) == 0  # far less than a drain may take
    finally:
        await stop(router)


async def test_a_port_that_is_taken_is_refused(house: House) -> None:
    worker = FakeWorker(1, house.folder / "nobody.sock")
    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        router = await start(worker, house.model, "--routers=2", f"--port={taken.getsockname()[1]}")
        assert await asyncio.wait_for(router.process.wait(), 20) == 2
