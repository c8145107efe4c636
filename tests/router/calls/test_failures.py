"""Workers that break, freeze, refuse or restart."""

from __future__ import annotations

import asyncio
import logging

import pytest

from tandem.proto import worker_pb2
from tests.router.conftest import House, until
from tests.router.fake_worker import Script

BODY = {"prompt": "Hello world", "max_tokens": 4}


async def test_both_workers_are_told_at_once_with_one_key(house: House) -> None:
    decode = await house.decode()
    prefill = await house.prefill(to=(decode,))
    client = await house.client(await house.router(decode, prefill))
    assert (await client.post("/v1/completions", json=BODY)).status_code == 200
    to_decode, to_prefill = decode.submits[0], prefill.submits[0]
    assert to_decode.key == to_prefill.key
    assert to_decode.expect_kv == worker_pb2.KvSource(worker_id="prefill-0", worker_epoch=1)
    assert to_prefill.send_kv_to.worker_id == "decode-0"
    assert to_decode.prompt_token_ids == to_prefill.prompt_token_ids
    assert to_decode.sampling == to_prefill.sampling


async def test_failed_prefill_becomes_a_recompute(house: House) -> None:
    decode = await house.decode()
    prefill = await house.prefill(script=Script(handover="error"), to=(decode,))
    client = await house.client(await house.router(decode, prefill))
    response = await client.post("/v1/completions", json=BODY)
    assert response.status_code == 200
    assert response.json()["usage"]["completion_tokens"] == 4
    assert decode.handovers_lost[0].key == decode.submits[0].key
    assert "out of luck" in decode.handovers_lost[0].reason


async def test_prefill_worker_that_dies_does_not_fail_the_request(house: House) -> None:
    decode = await house.decode()
    prefill = await house.prefill(script=Script(handover="never"), to=(decode,))
    client = await house.client(await house.router(decode, prefill))
    request = asyncio.create_task(client.post("/v1/completions", json=BODY))
    await until(lambda: prefill.submits)
    await prefill.kill()
    assert (await request).status_code == 200
    assert decode.handovers_lost[0].key == decode.submits[0].key
    assert (await client.post("/v1/completions", json=BODY)).status_code == 200
    assert not decode.submits[1].HasField("expect_kv"), "without a prefill worker nothing is expected"


async def test_decode_worker_that_dies_before_the_first_token_is_replaced(house: House) -> None:
    first = await house.decode("decode-0", Script(mute=True))
    second = await house.decode("decode-1")
    prefill = await house.prefill(to=(first, second))
    client = await house.client(await house.router(first, second, prefill))
    request = asyncio.create_task(client.post("/v1/completions", json={**BODY, "stream": True}))
    await until(lambda: first.submits or second.submits)
    if not first.submits:  # placed on the good one; the next goes to the other
        assert (await request).status_code == 200
        request = asyncio.create_task(client.post("/v1/completions", json={**BODY, "prompt": "Other", "stream": True}))
        await until(lambda: first.submits)
    await first.kill()
    response = await request
    assert response.status_code == 200
    assert "[DONE]" in response.text
    assert second.submits[-1].key.request_id == first.submits[-1].key.request_id
    assert second.submits[-1].key.epoch == first.submits[-1].key.epoch + 1


async def test_whole_answer_survives_a_decode_death_in_the_middle(house: House) -> None:
    worker, client = await house.pair(Script(hold_after=2))
    request = asyncio.create_task(client.post("/v1/completions", json=BODY))
    await until(lambda: worker.submits)
    await worker.kill()
    worker.script = Script()
    await worker.restart()
    response = await request
    assert response.status_code == 200
    assert response.json()["usage"]["completion_tokens"] == 4


async def test_request_fails_retriably_when_no_worker_comes_back(house: House) -> None:
    worker, client = await house.pair(Script(mute=True), worker_wait_s=0.2)
    request = asyncio.create_task(client.post("/v1/completions", json=BODY))
    await until(lambda: worker.submits)
    await worker.kill()
    response = await request
    assert (response.status_code, response.json()["error"]["code"]) == (503, "worker_lost")
    assert int(response.headers["retry-after"]) >= 1


async def test_new_requests_work_after_a_restart(house: House) -> None:
    worker = await house.decode()
    router = await house.router(worker, worker_wait_s=0.1)
    client = await house.client(router)
    assert (await client.post("/v1/completions", json=BODY)).status_code == 200
    await worker.kill()
    await until(lambda: not router.fleet.decode)
    response = await client.post("/v1/completions", json=BODY)
    assert (response.status_code, response.json()["error"]["code"]) == (503, "unavailable")
    assert (await client.get("/readyz")).status_code == 503
    assert (await client.get("/healthz")).status_code == 200
    await worker.restart()
    await until(lambda: router.fleet.decode)
    assert (await client.post("/v1/completions", json=BODY)).status_code == 200
    assert (await client.get("/readyz")).status_code == 200


async def test_a_new_request_waits_while_there_is_no_decode_worker(house: House) -> None:
    worker = await house.decode()
    router = await house.router(worker, worker_wait_s=60.0)
    client = await house.client(router)
    await worker.kill()
    await until(lambda: not router.fleet.decode)
    request = asyncio.create_task(client.post("/v1/completions", json=BODY))
    await until(lambda: router.service.admission.waiting_requests == 1)
    await worker.restart()
    assert (await request).status_code == 200


async def test_frozen_worker_is_noticed(house: House) -> None:
    worker = await house.decode(script=Script(mute=True))
    router = await house.router(worker, silence_s=2.0, worker_wait_s=0.1)
    client = await house.client(router)
    request = asyncio.create_task(client.post("/v1/completions", json=BODY))
    await until(lambda: worker.submits)
    worker.freeze()
    assert (await request).json()["error"]["code"] == "worker_lost"


async def test_a_worker_that_is_slow_to_connect_is_waited_for(house: House) -> None:
    worker = await house.decode()

    async def copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while content := await reader.read(1 << 16):
            writer.write(content)
        writer.close()

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(1.5)
        inner_reader, inner_writer = await asyncio.open_unix_connection(str(worker.socket))
        await asyncio.gather(copy(reader, inner_writer), copy(inner_reader, writer))

    socket, worker.socket = worker.socket, house.folder / "slow.sock"
    server = await asyncio.start_unix_server(connected, worker.socket)
    router = await house.router(worker, wait=False)
    worker.socket = socket
    await until(lambda: router.fleet.decode)
    server.close()


async def test_worker_with_another_namespace_is_refused(house: House, caplog: pytest.LogCaptureFixture) -> None:
    good = await house.decode("decode-0")
    other = await house.decode("decode-1", namespace=b"x" * 32)
    router = await house.router(good, wait=True)
    del router
    with caplog.at_level(logging.ERROR):
        router = await house.router(good, other, wait=False)
        await until(lambda: "is refused" in caplog.text)
    assert "KV namespace" in caplog.text
    await until(lambda: len(router.fleet.decode) == 1)


async def test_worker_of_the_wrong_role_is_refused(house: House, caplog: pytest.LogCaptureFixture) -> None:
    prefill = await house.prefill()
    prefill.role = worker_pb2.ROLE_DECODE
    with caplog.at_level(logging.ERROR):
        config_as_decode = await house.router(prefill, wait=False)
        prefill.role = worker_pb2.ROLE_PREFILL
        await until(lambda: "is refused: it is a prefill worker" in caplog.text)
    assert not config_as_decode.fleet.decode


async def test_deadline_cancels_on_the_worker(house: House) -> None:
    worker, client = await house.pair(Script(mute=True), request_timeout_s=0.2)
    response = await client.post("/v1/completions", json=BODY)
    assert (response.status_code, response.json()["error"]["code"]) == (504, "deadline_exceeded")
    await until(lambda: worker.cancels)


async def test_overloaded_worker_is_left_for_another(house: House) -> None:
    full = await house.decode("decode-0", Script(error=("overloaded", "no blocks")))
    free = await house.decode("decode-1")
    client = await house.client(await house.router(full, free))
    for _ in range(2):
        assert (await client.post("/v1/completions", json=BODY)).status_code == 200
    assert full.submits


async def test_overload_everywhere_is_503(house: House) -> None:
    _, client = await house.pair(Script(error=("overloaded", "no blocks")))
    response = await client.post("/v1/completions", json=BODY)
    assert (response.status_code, response.json()["error"]["code"]) == (503, "overloaded")
    assert response.headers["retry-after"] == "1"


async def test_too_many_sequences_are_503(house: House) -> None:
    worker, client = await house.pair(Script(mute=True), max_requests=3)
    request = asyncio.create_task(client.post("/v1/completions", json={**BODY, "n": 3}))
    await until(lambda: len(worker.submits) == 3)
    response = await client.post("/v1/completions", json=BODY)
    assert (response.status_code, response.json()["error"]["type"]) == (503, "overloaded_error")
    request.cancel()
    await until(lambda: len(worker.cancels) == 3)
    worker.script = Script()
    assert (await client.post("/v1/completions", json=BODY)).status_code == 200


async def test_draining_worker_gets_nothing_new(house: House) -> None:
    leaving = await house.decode("decode-0")
    staying = await house.decode("decode-1")
    router = await house.router(leaving, staying)
    client = await house.client(router)
    leaving.status.draining = True
    await until(lambda: len(router.fleet.decode) == 1)
    for _ in range(3):
        assert (await client.post("/v1/completions", json=BODY)).status_code == 200
    assert not leaving.submits


async def test_requests_spread_over_idle_workers(house: House) -> None:
    workers = [await house.decode(f"decode-{i}") for i in range(2)]
    client = await house.client(await house.router(*workers))
    for i in range(6):
        await client.post("/v1/completions", json={**BODY, "prompt": [10 + i]})
    assert [len(worker.submits) for worker in workers] == [3, 3]


async def test_a_prefix_stays_with_its_worker(house: House) -> None:
    workers = [await house.decode(f"decode-{i}") for i in range(3)]
    client = await house.client(await house.router(*workers))
    for i in range(6):
        await client.post("/v1/completions", json={**BODY, "prompt": [*range(10, 74), 100 + i]})
    assert sorted(len(worker.submits) for worker in workers) == [0, 0, 6]


async def test_running_requests_finish_while_the_router_drains(house: House) -> None:
    worker = await house.decode(script=Script(hold_after=1))
    router = await house.router(worker, drain_grace_s=5.0)
    client = await house.client(router)
    request = asyncio.create_task(client.post("/v1/completions", json=BODY))
    await until(lambda: worker.submits)
    stopping = asyncio.create_task(router.stop())
    await until(lambda: router.service.draining)
    worker.resume.set()
    assert (await request).status_code == 200
    await stopping


async def test_request_that_a_draining_worker_gives_up_waits_for_its_successor(house: House) -> None:
    worker, client = await house.pair(Script(error=("unavailable", "the worker is shutting down")))
    request = asyncio.create_task(client.post("/v1/completions", json=BODY))
    await until(lambda: worker.sent)
    worker.script = Script()
    await worker.restart()
    assert (await request).status_code == 200
    assert [submit.key.epoch for submit in worker.submits] == [1, 2]


async def test_a_failure_of_the_request_itself_is_neither_tried_elsewhere_nor_held_against_the_worker(
    house: House,
) -> None:
    script = Script(error=("computation_failed", "the model computed numbers that are not finite"))
    first, second = await house.decode("decode-0", script), await house.decode("decode-1", script)
    router = await house.router(first, second)
    client = await house.client(router)
    for sent in range(1, 9):
        response = await client.post("/v1/completions", json=BODY)
        assert response.status_code == 500
        assert response.json()["error"]["code"] == "computation_failed"
        assert "not finite" in response.json()["error"]["message"]
        assert len(first.submits) + len(second.submits) == sent
    assert not any(session.health.problem for session in router.fleet.decode)
