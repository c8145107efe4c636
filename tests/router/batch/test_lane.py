"""Batches from creation to result files, on scripted workers."""

from __future__ import annotations

import asyncio
import hashlib
import io
import json
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai import AsyncOpenAI

from tandem.common.fairness import LAST_BAND
from tandem.proto import worker_pb2
from tandem.router.batch import lane as lane_module
from tandem.router.batch import lines, store
from tandem.router.batch.lines import read_lines
from tandem.router.batch.order import BLOCK_TOKENS
from tandem.router.tenants.caller import ANYBODY, Caller
from tests.router.batch.conftest import Desk, OpenDesk, completion
from tests.router.conftest import House, until
from tests.router.fake_worker import FakeWorker, Script


def tokens(*groups: int) -> list[int]:
    """A prompt of blocks, each of one token."""
    return [token for token in groups for _ in range(BLOCK_TOKENS)]


def prompts(worker: FakeWorker) -> list[list[int]]:
    return [list(submit.prompt_token_ids) for submit in worker.submits]


async def test_results_equal_those_of_direct_requests(desk: OpenDesk, house: House) -> None:
    worker = await house.decode()
    office = await desk(worker)
    wanted = [completion(f"line {i}", f"Hello world {i}", logprobs=i % 2) for i in range(20)]
    batch_id = await office.create(wanted, metadata={"job": "7"})
    batch = await office.ended(batch_id)
    assert batch["status"] == "completed"
    assert batch["request_counts"] == {"total": 20, "completed": 20, "failed": 0}
    assert batch["metadata"] == {"job": "7"}
    assert batch["error_file_id"] is None
    assert batch["created_at"] <= batch["in_progress_at"] <= batch["finalizing_at"] <= batch["completed_at"]
    rows, _ = await office.results(batch)
    for line in wanted:
        row = rows[line["custom_id"]]
        direct = (await office.http.post("/v1/completions", json=line["body"])).json()
        assert row["error"] is None
        assert row["response"]["status_code"] == 200
        assert row["response"]["body"]["choices"] == direct["choices"]
        assert row["response"]["body"]["usage"] == direct["usage"]
        assert row["response"]["request_id"] in row["response"]["body"]["id"]


async def test_the_openai_client_runs_a_chat_batch(desk: OpenDesk, house: House) -> None:
    office = await desk(await house.decode())
    inner = httpx.AsyncClient(trust_env=False)
    client = AsyncOpenAI(base_url=f"{office.router.url}/v1", api_key="none", http_client=inner)
    url = "/v1/chat/completions"
    body = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 3}
    content = json.dumps({"custom_id": "a", "method": "POST", "url": url, "body": body}).encode()
    file = await client.files.create(file=("in.jsonl", content), purpose="batch")
    made = await client.batches.create(input_file_id=file.id, endpoint=url, completion_window="24h")
    await office.ended(made.id)
    batch = await client.batches.retrieve(made.id)
    assert batch.status == "completed"
    assert batch.request_counts is not None
    assert batch.request_counts.completed == 1
    assert batch.output_file_id is not None
    row = json.loads((await client.files.content(batch.output_file_id)).content)
    assert row["response"]["body"]["object"] == "chat.completion"
    assert [each.id async for each in client.batches.list()] == [made.id]
    with pytest.raises(Exception, match="has ended"):
        await client.batches.cancel(made.id)
    await client.close()


async def test_refused_requests_go_to_the_error_file(desk: OpenDesk, house: House) -> None:
    office = await desk(await house.decode())
    batch_id = await office.create(
        [
            completion("good"),
            completion("hot", temperature=9),
            completion("long", max_tokens=5000),
            completion("stream", stream=True),
            completion("elsewhere", model="gpt-4"),
        ]
    )
    batch = await office.ended(batch_id)
    assert batch["status"] == "completed"
    assert batch["request_counts"] == {"total": 5, "completed": 1, "failed": 4}
    good, bad = await office.results(batch)
    assert set(good) == {"good"}
    found = {
        name: (row["response"]["status_code"], row["response"]["body"]["error"]["param"]) for name, row in bad.items()
    }
    assert found == {
        "hot": (400, "temperature"),
        "long": (400, "max_tokens"),
        "stream": (400, "stream"),
        "elsewhere": (404, "model"),
    }


async def test_a_bad_input_file_fails_the_batch(desk: OpenDesk, house: House) -> None:
    office = await desk(await house.decode())
    batch_id = await office.create([completion("a"), completion("a"), completion("b", "x") | {"method": "PUT"}])
    batch = await office.ended(batch_id)
    assert batch["status"] == "failed"
    assert batch["failed_at"]
    assert batch["output_file_id"] is batch["error_file_id"] is None
    found = [(error["code"], error["line"]) for error in batch["errors"]["data"]]
    assert found == [("duplicate_custom_id", 2), ("invalid_method", 3)]


async def test_bad_batches_are_refused(desk: OpenDesk, house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    office = await desk(await house.decode(), room=lambda tokens: False)
    file_id = (await office.upload(b"{}\n")).json()["id"]
    good = {"input_file_id": file_id, "endpoint": "/v1/completions", "completion_window": "24h"}

    async def refused(**changes: Any) -> tuple[int, str | None]:
        answer = await office.http.post("/v1/batches", json=good | changes)
        return answer.status_code, answer.json()["error"]["param"]

    assert await refused(endpoint="/v1/files") == (400, "endpoint")
    assert await refused(completion_window="1h") == (400, "completion_window")
    assert await refused(input_file_id="file-x") == (404, "input_file_id")
    assert await refused(metadata={str(i): "" for i in range(20)}) == (400, "metadata")
    assert await refused(metadata={"a": "x" * 600}) == (400, "metadata")
    assert await refused(output_expires_after={"anchor": "x", "seconds": 9999}) == (400, "output_expires_after[anchor]")
    assert await refused(output_expires_after={"anchor": "created_at", "seconds": 1}) == (
        400,
        "output_expires_after[seconds]",
    )
    assert (await office.http.get("/v1/batches/x")).status_code == 404
    assert (await office.http.post("/v1/batches/x/cancel")).status_code == 404
    assert (await office.http.get("/v1/batches", params={"limit": 101})).status_code == 400
    await office.create([completion("a")])
    monkeypatch.setattr(store, "MAX_UNFINISHED", 1)
    assert (await refused())[0] == 429


async def test_lines_run_in_the_lowest_band_for_their_tenant(desk: OpenDesk, house: House) -> None:
    worker = await house.decode()
    office = await desk(worker)
    await office.ended(await office.create([completion("a", priority=-5)]))
    assert [(submit.priority, submit.tenant) for submit in worker.submits] == [(LAST_BAND, "default")]


async def test_each_prefix_is_computed_once_before_those_that_share_it(desk: OpenDesk, house: House) -> None:
    """The workers say nothing at first: only one of each group, and what shares nothing, may be there."""
    worker = await house.decode(script=Script(hold_after=0))
    office = await desk(worker)
    wanted = [completion(f"{group}-{i}", [*tokens(group, group), i]) for i in range(4) for group in (11, 12, 13)]
    batch_id = await office.create([*wanted, completion("alone", [99] * 10)])
    await until(lambda: len(worker.submits) == 4)
    assert sorted({prompt[0] for prompt in prompts(worker)}) == [11, 12, 13, 99]
    worker.resume.set()
    batch = await office.ended(batch_id)
    assert batch["request_counts"]["completed"] == 13
    assert len(worker.submits) == 13


async def test_responses_with_the_same_instructions_follow_the_first(desk: OpenDesk, house: House) -> None:
    worker = await house.decode(script=Script(hold_after=0))
    office = await desk(worker)
    url = "/v1/responses"
    made = [
        {"instructions": f"{text} world, user! " * 40, "input": f"Hello {i}", "max_output_tokens": 2}
        for text in ("Hello", "The old mill")
        for i in range(3)
    ]
    lines = [{"custom_id": str(i), "method": "POST", "url": url, "body": body} for i, body in enumerate(made)]
    batch_id = await office.create(lines, url)
    await until(lambda: len(worker.submits) == 2)
    first, second = prompts(worker)
    assert first[:BLOCK_TOKENS] != second[:BLOCK_TOKENS], "one of each"
    worker.resume.set()
    assert (await office.ended(batch_id))["request_counts"] == {"total": 6, "completed": 6, "failed": 0}


async def test_equal_embeddings_wait_for_nothing(desk: OpenDesk, house: House) -> None:
    """There is no first token to wait for."""
    worker = await house.decode(script=Script(mute=True))
    office = await desk(worker)
    url = "/v1/embeddings"
    body = {"input": "Hello world, user! " * 40}
    await office.create([{"custom_id": str(i), "method": "POST", "url": url, "body": body} for i in range(3)], url)
    await until(lambda: len(worker.submits) == 3)


async def test_followers_start_at_the_first_token_and_not_at_the_end(desk: OpenDesk, house: House) -> None:
    worker = await house.decode(script=Script(hold_after=1))
    office = await desk(worker)
    await office.create([completion(str(i), [*tokens(11, 11), i]) for i in range(5)])
    await until(lambda: len(worker.submits) == 5)


async def test_decode_heavy_groups_go_first(desk: OpenDesk, house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lane_module, "MAX_RUNNING", 1)
    worker = await house.decode()
    office = await desk(worker)
    wanted = [completion(f"{out}-{i}", [*tokens(out, out), i], max_tokens=out) for i in range(3) for out in (5, 50, 20)]
    await office.ended(await office.create(wanted))
    assert [submit.sampling.max_tokens for submit in worker.submits] == [50] * 3 + [20] * 3 + [5] * 3


async def test_lines_wait_while_clients_need_the_room(desk: OpenDesk, house: House) -> None:
    room = [False]
    asked: list[int] = []

    def has_room(prompt_tokens: int) -> bool:
        asked.append(prompt_tokens)
        return room[0]

    worker = await house.decode()
    office = await desk(worker, room=has_room)
    batch_id = await office.create([completion("a", [5] * 30)])
    await until(lambda: len(asked) > 5)
    assert worker.submits == []
    assert asked[0] == 30
    assert (await office.http.post("/v1/completions", json=completion("x")["body"])).status_code == 200
    room[0] = True
    assert (await office.ended(batch_id))["status"] == "completed"


async def test_a_share_of_the_slots_stays_free(desk: OpenDesk, house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = [0]
    worker = await house.decode(script=Script(hold_after=1))
    office = await desk(worker)
    spare = office.lane._spare

    def counted() -> bool:
        asked[0] += not spare()
        return spare()

    monkeypatch.setattr(office.lane, "_spare", counted)
    slots = int(worker.info().max_num_seqs * lane_module.SLOT_SHARE)
    batch_id = await office.create([completion(str(i), [i + 3] * 20) for i in range(slots + 30)])
    await until(lambda: len(worker.submits) == slots)
    await until(lambda: asked[0] > 5)
    assert len(worker.submits) == slots
    worker.resume.set()
    batch = await office.ended(batch_id)
    assert batch["request_counts"]["completed"] == slots + 30


async def test_the_lane_of_a_router_starts_nothing_while_admission_has_no_room(
    house: House, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    room, asked = [False], [0]

    def has_room(prompt_tokens: int, priority: int) -> bool:
        asked[0] += 1
        return room[0]

    monkeypatch.setattr("tandem.router.batch.lane.POLL_S", 0.05)
    worker = await house.decode()
    router = await house.router(worker, storage=tmp_path / "storage")
    monkeypatch.setattr(router.service.admission, "_room", has_room)
    assert router.service.batches is not None
    office = Desk(router, router.service.batches, await house.client(router))
    batch_id = await office.create([completion("a")])
    await office.reached(batch_id, "in_progress")
    asked[0] = 0
    await until(lambda: asked[0] > 5)
    assert (worker.submits, router.service.admission.waiting_requests) == ([], 0)
    room[0] = True
    assert (await office.ended(batch_id))["status"] == "completed"


async def test_workers_short_of_memory_get_no_lines(desk: OpenDesk, house: House) -> None:
    status = worker_pb2.WorkerStatus(total_blocks=100, free_blocks=10)
    worker = await house.decode(status=status)
    office = await desk(worker)
    await until(lambda: office.router.fleet.decode[0].status.total_blocks == 100)
    batch_id = await office.create([completion("a")])
    await office.reached(batch_id, "in_progress")
    assert office.lane._start_lines(), "a line waits"
    assert worker.submits == []
    worker.status = worker_pb2.WorkerStatus(total_blocks=100, free_blocks=90)
    assert (await office.ended(batch_id))["status"] == "completed"


async def test_a_lost_worker_costs_no_line(desk: OpenDesk, house: House) -> None:
    worker = await house.decode(script=Script(hold_after=1))
    office = await desk(worker, worker_wait_s=0.2)
    batch_id = await office.create([completion(str(i), [i + 3] * 20) for i in range(30)])
    await until(lambda: len(worker.submits) == 30)
    worker.script.hold_after = None
    await worker.restart()
    batch = await office.ended(batch_id)
    assert batch["request_counts"] == {"total": 30, "completed": 30, "failed": 0}


async def test_overload_is_waited_out(desk: OpenDesk, house: House) -> None:
    worker = await house.decode(script=Script(error=("overloaded", "full")))
    office = await desk(worker)
    batch_id = await office.create([completion(str(i)) for i in range(3)])
    await until(lambda: len(worker.submits) > 10)
    worker.script.error = None
    batch = await office.ended(batch_id)
    assert batch["request_counts"] == {"total": 3, "completed": 3, "failed": 0}


async def test_a_line_that_always_fails_ends_as_an_error(desk: OpenDesk, house: House) -> None:
    worker = await house.decode(script=Script(error=("internal", "out of luck")))
    office = await desk(worker)
    batch = await office.ended(await office.create([completion("a")]))
    _, bad = await office.results(batch)
    assert bad["a"]["response"]["status_code"] == 500
    assert len(worker.submits) == 1


async def test_another_process_goes_on_where_one_stopped(desk: OpenDesk, house: House) -> None:
    """Only one runs the lane; lines with a result are not run again; what was in flight is."""
    held = tokens(200)
    worker = await house.decode()
    worker.script.tokens = lambda submit: [1, 2, 3, 4]
    real = worker.outputs

    async def outputs(submit: worker_pb2.Submit) -> Any:
        if list(submit.prompt_token_ids) == held:
            await worker.resume.wait()
        async for output in real(submit):
            yield output

    worker.outputs = outputs  # type: ignore[method-assign]
    first, second = await desk(worker), await desk(worker)
    batch_id = await first.create([completion("held", held), *(completion(str(i), [i + 3] * 9) for i in range(10))])
    for office in (first, second):
        await office.progressed(batch_id, 10)
    assert len(worker.submits) == 11
    assert first.lane._main is not None
    first.lane._main.cancel()
    await until(lambda: len(worker.submits) == 12)
    worker.resume.set()
    batch = await second.ended(batch_id)
    assert batch["request_counts"] == {"total": 11, "completed": 11, "failed": 0}
    good, bad = await second.results(batch)
    assert len(good) == 11
    assert bad == {}
    assert prompts(worker).count(held) == 2
    assert len(worker.submits) == 12


async def test_cancelling_keeps_what_is_done(desk: OpenDesk, house: House) -> None:
    worker = await house.decode()
    office = await desk(worker)
    worker.script.tokens = lambda submit: [1, 2, 3, 4]
    batch_id = await office.create([completion(str(i), [i + 3] * 20) for i in range(5)])
    done = await office.ended(batch_id)
    worker.script.hold_after = 0
    other = await desk(worker)  # cancels through a process that does not run the lane
    batch_id = await office.create([completion(str(i), [i + 3] * 20) for i in range(5)])
    await until(lambda: len(worker.submits) == 10)
    answer = await other.http.post(f"/v1/batches/{batch_id}/cancel")
    assert answer.json()["status"] == "cancelling"
    batch = await office.ended(batch_id)
    assert batch["status"] == "cancelled"
    assert batch["cancelled_at"] >= batch["cancelling_at"]
    good, bad = await office.results(batch)
    assert good == {}
    assert {row["error"]["code"] for row in bad.values()} == {"batch_cancelled"}
    assert len(bad) == 5
    await until(lambda: len(worker.cancelled_ids) == 5)
    assert done["status"] == "completed"


async def test_a_batch_expires(desk: OpenDesk, house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    worker = await house.decode(script=Script(hold_after=0))
    office = await desk(worker)
    batch_id = await office.create([completion("a")])
    await until(lambda: worker.submits)
    monkeypatch.setattr("tandem.router.batch.records.BATCH_WINDOW_S", -1)
    batch = await office.ended(batch_id)
    assert batch["status"] == "expired"
    assert batch["expired_at"]
    _, bad = await office.results(batch)
    assert bad["a"]["error"]["code"] == "batch_expired"


async def test_an_input_file_stays_while_its_batch_needs_it(desk: OpenDesk, house: House) -> None:
    worker = await house.decode(script=Script(hold_after=0))
    office = await desk(worker)
    batch_id = await office.create([completion("a")])
    file_id = (await office.batch(batch_id))["input_file_id"]
    answer = await office.http.delete(f"/v1/files/{file_id}")
    assert answer.status_code == 400
    assert batch_id in answer.json()["error"]["message"]
    worker.resume.set()
    await office.ended(batch_id)
    assert (await office.http.delete(f"/v1/files/{file_id}")).json()["deleted"]


async def test_a_result_that_cannot_be_written_is_computed_again(
    desk: OpenDesk, house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, broken = lines.write_all, [2]

    def write_all(descriptor: int, data: bytes) -> None:
        if broken[0]:
            broken[0] -= 1
            real(descriptor, data[:7])
            raise OSError(28, "No space left on device")
        real(descriptor, data)

    monkeypatch.setattr(lines, "write_all", write_all)
    office = await desk(await house.decode())
    batch = await office.ended(await office.create([completion(str(i)) for i in range(6)]))
    assert batch["request_counts"] == {"total": 6, "completed": 6, "failed": 0}
    assert len(await office.rows(batch["output_file_id"])) == 6


async def test_an_end_that_fails_half_way_is_done_again(
    desk: OpenDesk, house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last transaction is lost once: another look at the index ends the batch, without a line run again."""
    real, broken = store.Index._insert_file, [1]

    def insert(index: store.Index, record: Any) -> None:
        if broken and record.purpose == "batch_output":
            broken.clear()
            raise OSError(5, "Input/output error")
        real(index, record)

    monkeypatch.setattr(store.Index, "_insert_file", insert)
    worker = await house.decode()
    office = await desk(worker)
    batch = await office.ended(await office.create([completion(str(i)) for i in range(6)]))
    assert not broken
    assert batch["status"] == "completed"
    assert len(await office.rows(batch["output_file_id"])) == len(worker.submits) == 6


async def test_tenants_see_only_their_own(desk: OpenDesk, house: House, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    names = ("alice", "bob")
    keys.write_text("".join(f"{name}:{hashlib.sha256(name.encode()).hexdigest()}\n" for name in names))
    worker = await house.decode()
    office = await desk(worker, api_keys_file=keys, caller_of={name: Caller(name) for name in names}.get)

    async def of(name: str) -> Desk:
        headers = {"authorization": f"Bearer {name}"}
        return Desk(office.router, office.lane, await house.client(office.router, headers=headers))

    alice, bob = await of("alice"), await of("bob")
    batch_id = await alice.create([completion("a")])
    batch = await alice.ended(batch_id)
    assert {submit.tenant for submit in worker.submits} == {"alice"}
    own = (batch["input_file_id"], batch["output_file_id"])
    for file_id in own:
        for method, path in (("GET", ""), ("GET", "/content"), ("DELETE", "")):
            assert (await bob.http.request(method, f"/v1/files/{file_id}{path}")).status_code == 404
    assert (await bob.http.get(f"/v1/batches/{batch_id}")).status_code == 404
    assert (await bob.http.post(f"/v1/batches/{batch_id}/cancel")).status_code == 404
    stolen = {"input_file_id": own[0], "endpoint": "/v1/completions", "completion_window": "24h"}
    assert (await bob.http.post("/v1/batches", json=stolen)).status_code == 404
    for path in ("files", "batches"):
        assert (await bob.http.get(f"/v1/{path}")).json()["data"] == []
        assert len((await alice.http.get(f"/v1/{path}")).json()["data"]) == (2 if path == "files" else 1)


async def test_batches_of_two_tenants_take_turns(
    desk: OpenDesk, house: House, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = tmp_path / "keys"
    names = ("alice", "bob")
    keys.write_text("".join(f"{name}:{hashlib.sha256(name.encode()).hexdigest()}\n" for name in names))
    monkeypatch.setattr(lane_module, "MAX_RUNNING", 1)
    go = [False]
    worker = await house.decode()
    office = await desk(
        worker, api_keys_file=keys, caller_of={name: Caller(name) for name in names}.get, room=lambda tokens: go[0]
    )
    made = []
    for name in names:
        http = await house.client(office.router, headers={"authorization": f"Bearer {name}"})
        one = Desk(office.router, office.lane, http)
        batch_id = await one.create([completion(str(i), [i + 3] * 20) for i in range(10)])
        await one.reached(batch_id, "in_progress")
        made.append((one, batch_id))
    go[0] = True
    for one, batch_id in made:
        await one.ended(batch_id)
    turns = [submit.tenant for submit in worker.submits]
    assert all(abs(turns[:n].count("alice") - turns[:n].count("bob")) <= 1 for n in range(21))


async def test_a_tenant_that_is_no_more_ends_its_batch(desk: OpenDesk, house: House) -> None:
    office = await desk(await house.decode(), caller_of={"somebody": ANYBODY}.get)
    batch = await office.ended(await office.create([completion("a")]))
    assert batch["status"] == "failed"
    assert [error["code"] for error in batch["errors"]["data"]] == ["permission_denied"]
    _, bad = await office.results(batch)
    assert bad["a"]["error"]["code"] == "batch_failed"


def can_be_read(row: str) -> bool:
    return not read_lines(io.BytesIO(row.encode()), "/v1/completions", 9999)[1]


async def test_lines_of_any_depth_get_an_answer(desk: OpenDesk, house: House) -> None:
    """What can just be read may be too deep to be written."""
    office = await desk(await house.decode())
    rows = []
    for depth in range(80, 110):
        row = json.dumps(completion(str(depth), deep="DEEP"))
        rows.append(row.replace('"DEEP"', "[" * depth + "]" * depth))
    readable = [row for row in rows if await asyncio.to_thread(can_be_read, row)]
    assert len(readable) < len(rows)
    file_id = (await office.upload("\n".join(readable).encode())).json()["id"]
    body = {"input_file_id": file_id, "endpoint": "/v1/completions", "completion_window": "24h"}
    batch = await office.ended((await office.http.post("/v1/batches", json=body)).json()["id"])
    assert batch["status"] == "completed"
    assert batch["request_counts"]["completed"] + batch["request_counts"]["failed"] == len(readable)
    _, errors = await office.results(batch)
    assert {row["response"]["status_code"] for row in errors.values()} <= {400}
