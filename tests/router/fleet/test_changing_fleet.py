"""Workers that come and go while a router runs: used at once, left at once, and nothing of them stays."""

from __future__ import annotations

import asyncio
import shutil
import time
from pathlib import Path

import pytest

from tandem.common.errors import ConfigError
from tandem.common.fingerprint import fingerprint, shown
from tandem.proto import worker_pb2
from tandem.router.app import Router
from tandem.router.fleet import sources, workers
from tandem.router.fleet.sources import NameSource, Target
from tandem.router.settings import RouterConfig
from tests.router.conftest import House, router_metrics, until
from tests.router.fake_worker import FakeWorker, Script
from tests.router.fleet.test_sources import Names, write

BODY = {"prompt": "Hello world", "max_tokens": 4}


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "FILE_POLL_S", 0.01)
    monkeypatch.setattr(sources, "NAME_PAUSE_S", 0.01)


def listing(house: House, *workers: FakeWorker) -> Path:
    """The file of workers, with these."""
    lines = [
        f"{name}: [{', '.join(worker.target for worker in workers if worker.role == role)}]"
        for name, role in (("decode", worker_pb2.ROLE_DECODE), ("prefill", worker_pb2.ROLE_PREFILL))
    ]
    return write(house.folder / "workers.yaml", "\n".join(lines))


def names(router: Router) -> list[str]:
    """Workers that take requests."""
    return sorted(session.name for session in [*router.fleet.decode, *router.fleet.prefill])


async def test_a_worker_that_comes_is_used_and_one_that_goes_leaves_nothing(house: House) -> None:
    first, second = await house.decode("decode-0"), await house.decode("decode-1")
    prefill = await house.prefill(to=(first, second))
    router = await house.router(workers_file=listing(house, first))
    client = await house.client(router)
    await until(lambda: names(router) == ["decode-0"])
    assert (await client.post("/v1/completions", json=BODY)).status_code == 200
    pool = router.service._context.dispatcher.pool
    before = len(pool._states), pool.index._slots.bit_count()
    listing(house, first, second, prefill)
    await until(lambda: names(router) == ["decode-0", "decode-1", "prefill-0"])
    for _ in range(4):
        assert (await client.post("/v1/completions", json=BODY)).status_code == 200
    assert second.submits
    assert prefill.submits
    listing(house, first)
    await until(lambda: len(router.fleet.clients) == 1)
    assert names(router) == ["decode-0"]
    assert (len(pool._states), pool.index._slots.bit_count()) == before
    text = await router_metrics(client)
    assert 'worker="decode-0"' in text
    assert "decode-1" not in text
    assert "prefill-0" not in text
    assert [worker["worker"] for worker in (await client.get("/readyz")).json()["workers"]] == ["decode-0"]
    assert len([task for task in asyncio.all_tasks() if task.get_name().startswith("worker ")]) == 1


async def test_a_worker_that_goes_finishes_what_it_has_and_gets_nothing_new(house: House) -> None:
    going = await house.decode("decode-0", Script(hold_after=2))
    staying = await house.decode("decode-1")
    router = await house.router(workers_file=listing(house, going))
    client = await house.client(router)
    running = asyncio.create_task(client.post("/v1/completions", json=BODY))
    await until(lambda: going.submits)
    listing(house, staying)
    await until(lambda: names(router) == ["decode-1"])
    assert (await client.post("/v1/completions", json=BODY)).status_code == 200
    assert len(router.fleet.clients) == 2, "a request runs on it"
    going.resume.set()
    response = await running
    assert response.json()["usage"]["completion_tokens"] == 4
    assert len(going.submits) == 1
    assert not going.cancels
    await until(lambda: len(router.fleet.clients) == 1)


async def test_a_worker_that_dies_while_it_leaves_is_replaced(house: House) -> None:
    going = await house.decode("decode-0", Script(hold_after=2))
    router = await house.router(workers_file=listing(house, going))
    client = await house.client(router)
    running = asyncio.create_task(client.post("/v1/completions", json=BODY))
    await until(lambda: going.submits)
    staying = await house.decode("decode-1")
    listing(house, staying)
    await until(lambda: names(router) == ["decode-1"])
    await going.kill()
    assert (await running).json()["usage"]["completion_tokens"] == 4
    assert staying.submits[0].key.epoch == 2
    await until(lambda: len(router.fleet.clients) == 1)


async def test_a_worker_that_is_listed_again_before_it_has_left_stays(house: House) -> None:
    worker = await house.decode("decode-0", Script(hold_after=2))
    router = await house.router(workers_file=listing(house, worker))
    client = await house.client(router)
    running = asyncio.create_task(client.post("/v1/completions", json=BODY))
    await until(lambda: worker.submits)
    session = router.fleet.decode[0]
    listing(house)
    await until(lambda: not names(router))
    listing(house, worker)
    await until(lambda: names(router) == ["decode-0"])
    worker.resume.set()
    assert (await running).status_code == 200
    assert router.fleet.decode == [session]
    for _ in range(20):  # to and fro, whatever it is doing just then
        listing(house)
        await asyncio.sleep(0.01)
        listing(house, worker)
    await until(lambda: names(router) == ["decode-0"])
    assert (await client.post("/v1/completions", json=BODY)).status_code == 200


async def test_requests_wait_for_the_first_worker(house: House) -> None:
    router = await house.router(wait=False, workers_file=listing(house), worker_wait_s=60.0)
    client = await house.client(router)
    waiting = [asyncio.create_task(client.post("/v1/completions", json=BODY)) for _ in range(3)]
    await until(lambda: router.service.admission.waiting_requests == 3)
    assert (await client.get("/readyz")).status_code == 503
    worker = await house.decode()
    listing(house, worker)
    assert [(await each).status_code for each in waiting] == [200] * 3


async def test_a_mistake_in_the_file_keeps_the_workers_and_is_told_everywhere(
    house: House, caplog: pytest.LogCaptureFixture
) -> None:
    worker = await house.decode()
    path = listing(house, worker)
    router = await house.router(workers_file=path)
    client = await house.client(router)
    await until(lambda: names(router) == ["decode-0"])
    write(path, "decode: [nonsense]")
    await until(lambda: router.fleet.sources[0].problem)
    ready = (await client.get("/readyz")).json()
    assert ready["status"] == "ready"
    assert "line 1: decode[0] must be HOST:PORT or unix:/path, got 'nonsense'" in ready["problems"][0]
    assert f'tandem_router_worker_source_stale{{source="file {path}"}} 1.0' in await router_metrics(client)
    assert "stay as they were" in caplog.text
    assert (await client.post("/v1/completions", json=BODY)).status_code == 200
    listing(house, worker)
    await until(lambda: not router.fleet.sources[0].problem)
    assert (await client.get("/readyz")).json()["problems"] == []
    assert f'tandem_router_worker_source_stale{{source="file {path}"}} 0.0' in await router_metrics(client)


async def test_a_source_that_breaks_is_followed_again(
    house: House, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(workers, "WATCH_AGAIN_S", 0.01)
    looks = iter([RuntimeError("a bug")])
    read = sources.read_workers

    def breaks_once(path: Path) -> frozenset[Target]:
        for error in looks:
            raise error
        return read(path)

    worker = await house.decode()
    router = await house.router(wait=False, workers_file=listing(house))
    monkeypatch.setattr(sources, "read_workers", breaks_once)
    listing(house, worker)
    await until(lambda: "workers of the file" in caplog.text)
    listing(house)
    listing(house, worker)
    await until(lambda: names(router) == ["decode-0"])


async def test_a_worker_of_another_model_is_refused_with_target_and_reason(
    house: House, caplog: pytest.LogCaptureFixture
) -> None:
    right = await house.decode("decode-0")
    router = await house.router(workers_file=listing(house, right))
    client = await house.client(router)
    await until(lambda: names(router) == ["decode-0"])
    wrong = await house.decode("decode-1", namespace=b"x" * 32)
    listing(house, right, wrong)
    await until(lambda: any(each.problem for each in router.fleet.clients))
    refused = next(each for each in (await client.get("/readyz")).json()["workers"] if not each["connected"])
    assert refused["target"] == wrong.target
    assert "another model" in refused["problem"]
    assert f"worker {wrong.target} is refused" in caplog.text
    assert names(router) == ["decode-0"]


async def test_an_unreachable_worker_is_told_of_with_its_reason(house: House) -> None:
    absent = FakeWorker(worker_pb2.ROLE_DECODE, house.folder / "absent.sock")
    router = await house.router(absent, wait=False)
    client = await house.client(router)
    await until(lambda: router.fleet.clients[0].problem)
    (told,) = (await client.get("/readyz")).json()["workers"]
    assert (told["target"], told["worker"]) == (absent.target, None)
    assert "UNAVAILABLE" in told["problem"]


async def test_a_worker_that_was_lost_is_told_of_at_once(house: House) -> None:
    worker = await house.decode()
    router = await house.router(worker)
    client = router.fleet.clients[0]
    await worker.kill()
    await until(lambda: client.session is None)
    assert client.problem


async def test_a_quiet_worker_gets_nothing_new_until_it_is_heard_again(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "QUIET_S", 0.5)
    worker = await house.decode()
    router = await house.router(worker, silence_s=60.0, worker_wait_s=60.0)
    client = await house.client(router)
    worker.freeze()
    await until(lambda: not router.fleet.decode)
    assert router.fleet.clients[0].session is not None
    request = asyncio.create_task(client.post("/v1/completions", json=BODY))
    await until(lambda: router.service.admission.waiting_requests)
    assert not worker.submits
    worker._thawed.set()
    assert (await request).status_code == 200


async def test_a_router_that_was_held_up_itself_goes_on_with_its_workers(house: House) -> None:
    worker = await house.decode()
    router = await house.router(worker, silence_s=2.0)
    client = await house.client(router)
    session = router.fleet.clients[0].session
    worker.freeze()
    held_up = asyncio.Event()

    def hold_up() -> None:
        time.sleep(3.0)  # longer than the silence after which a worker is given up: nobody could be heard
        held_up.set()

    asyncio.get_running_loop().call_soon(hold_up)
    await held_up.wait()
    assert router.fleet.decode, "it gets requests at once"
    worker._thawed.set()
    assert (await client.post("/v1/completions", json=BODY)).status_code == 200
    assert router.fleet.clients[0].session is session


async def test_a_name_whose_worker_was_lost_leads_to_the_next_one(house: House) -> None:
    first, second = await house.decode("decode-0"), await house.decode("decode-1")
    addresses = Names(str(first.target))
    router = await house.router(workers_file=listing(house))
    source = NameSource(worker_pb2.ROLE_DECODE, "decode.svc", 1, lambda *_: _as_they_are(addresses), every_s=3600.0)
    router.fleet.sources = [*router.fleet.sources, source]
    watcher = asyncio.create_task(source.watch(router.fleet._follow))
    try:
        await until(lambda: names(router) == ["decode-0"])
        addresses.addresses = (str(second.target),)
        await first.kill()
        await until(lambda: names(router) == ["decode-1"])
        assert router.fleet.clients[0].target == Target(worker_pb2.ROLE_DECODE, second.target)
    finally:
        watcher.cancel()


async def _as_they_are(names: Names) -> tuple[str, ...]:
    return names.addresses


async def test_a_name_leads_to_the_worker_behind_it(house: House) -> None:
    worker = FakeWorker(worker_pb2.ROLE_DECODE, house.folder / "decode-0.sock")
    port = await worker.start_on_tcp()
    try:
        router = await house.router(wait=False, workers_file=listing(house))
        source = NameSource(worker_pb2.ROLE_DECODE, "localhost", port)
        router.fleet.sources = [*router.fleet.sources, source]
        watcher = asyncio.create_task(source.watch(router.fleet._follow))
        client = await house.client(router)
        await until(lambda: names(router) == ["decode-0"])
        assert (await client.post("/v1/completions", json=BODY)).status_code == 200
        watcher.cancel()
    finally:
        await worker.kill()


async def test_a_worker_with_two_addresses_is_used_once_and_survives_the_loss_of_one(house: House) -> None:
    worker = await house.decode("decode-0")
    link = house.folder / "link.sock"
    link.symlink_to(worker.socket)
    listed = write(house.folder / "workers.yaml", f"decode: ['{worker.target}', 'unix:{link}']")
    router = await house.router(workers_file=listed, wait=False)
    client = await house.client(router)
    await until(lambda: names(router) == ["decode-0"])
    await until(lambda: len(router.fleet.clients) == 1)
    used = router.fleet.clients[0].target.address
    assert (await client.get("/metrics")).text.count("tandem_worker_up{") == 1
    other = worker.target if used != worker.target else f"unix:{link}"
    write(listed, f"decode: ['{other}']")
    await until(lambda: names(router) == ["decode-0"] and router.fleet.clients[0].target.address == other)
    assert (await client.post("/v1/completions", json=BODY)).status_code == 200


async def test_the_routers_own_model_decides_whoever_comes_first(house: House, model_folder: Path) -> None:
    folder = Path(shutil.copytree(model_folder, house.folder / "model"))
    (folder / "model.safetensors").write_bytes(b"weights")
    mine = fingerprint(folder)
    wrong = await house.decode("wrong", fingerprint=b"x" * 32, namespace=b"o" * 32)
    house.model = folder
    router = await house.router(wrong, wait=False, workers_file=listing(house))
    client = await house.client(router)
    await until(lambda: router.fleet.clients[0].problem)
    (told,) = (await client.get("/readyz")).json()["workers"]
    assert told["target"] == wrong.target
    assert f"{shown(mine)} (--model, or --model-fingerprint)" in told["problem"]
    assert shown(b"x" * 32) in told["problem"]
    listing(house, await house.decode("right", fingerprint=mine))
    await until(lambda: names(router) == ["right"])
    assert (await client.post("/v1/completions", json=BODY)).status_code == 200
    assert not wrong.submits


async def test_a_setting_says_which_model_it_is_where_the_router_has_no_weights(house: House) -> None:
    wrong, right = (
        await house.decode("wrong", fingerprint=b"x" * 32),
        await house.decode("right", fingerprint=b"y" * 32),
    )
    router = await house.router(wrong, right, wait=False, model_fingerprint=shown(b"y" * 32).upper())
    await until(lambda: names(router) == ["right"])
    await until(lambda: any("other weights" in worker.problem for worker in router.fleet.clients))
    with pytest.raises(ConfigError, match="model_fingerprint 'small': must be hexadecimal digits"):
        RouterConfig(model="m", model_fingerprint="small")


async def test_where_nothing_says_which_model_it_is_the_first_decides_and_the_remedy_is_told(house: House) -> None:
    first = await house.decode("first", fingerprint=b"x" * 32)
    router = await house.router(first, workers_file=listing(house))
    second = await house.decode("second", fingerprint=b"y" * 32, namespace=b"o" * 32)
    listing(house, second)
    await until(lambda: any(client.problem for client in router.fleet.clients))
    (problem,) = [client.problem for client in router.fleet.clients if client.problem]
    assert f"give --model-fingerprint ({shown(b'y' * 32)} or {shown(b'x' * 32)})" in problem
    assert names(router) == ["first"]
