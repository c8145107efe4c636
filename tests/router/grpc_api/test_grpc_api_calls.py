"""Around a gRPC call: keys, metadata, limits, deadlines, cancellation, slow readers, and messages that are none."""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from google.protobuf import json_format
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo, RetryInfo

from tandem.proto import inference_pb2 as pb
from tandem.router.calls import generate
from tandem.router.grpc_api import generate as grpc_generate
from tandem.router.grpc_api.explain import account_message
from tandem.router.web import body_memory
from tests.kvstore.store_node import StoreNode
from tests.router.both_doors import BothDoors, Refusal, details_of, joined_stream, refusal, refusal_of, streamed
from tests.router.conftest import House, until
from tests.router.fake_worker import Script

HELLO = pb.GenerateRequest(prompt="Hello", max_tokens=3)


@pytest.fixture
async def doors(house: House) -> AsyncIterator[BothDoors]:
    both = await BothDoors.open(house, Script(delay_s=0.001))
    yield both
    await both.close()


@pytest.fixture
async def keyed(house: House, tmp_path: Path) -> AsyncIterator[BothDoors]:
    """Tenants with limits; their names are their keys."""
    lines = ["tenants:"]
    for name, fields in (
        ("ann", ""),
        ("one", "requests_per_minute: 1"),
        ("few", "requests_per_minute: 2\n   tokens_per_minute: 30"),
        ("low", "priority_min: 5"),
        ("other", "models: [another]"),
        ("root", "admin: true"),
    ):
        lines += [f" - name: {name}", f"   keys: [{hashlib.sha256(name.encode()).hexdigest()}]", f"   {fields}"]
    (tmp_path / "tenants.yaml").write_text("\n".join(lines))
    both = await BothDoors.open(house, tenants_file=tmp_path / "tenants.yaml")
    yield both
    await both.close()


def key(name: str) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {name}"),)


async def failure(call: Any) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value


async def test_keys_come_as_bearer_or_x_api_key(keyed: BothDoors) -> None:
    for metadata in (key("ann"), (("x-api-key", "ann"),)):
        assert (await keyed.stub.Complete(HELLO, metadata=metadata)).choices
    assert {submit.tenant for submit in keyed.submitted()} == {"ann"}
    for metadata in ((), (("x-api-key", "nobody"),), (("authorization", "ann"),)):
        for call in (
            keyed.stub.Complete(HELLO, metadata=metadata),
            keyed.stub.Generate(HELLO, metadata=metadata).read(),
        ):
            error = await failure(call)
            assert error.code() is grpc.StatusCode.UNAUTHENTICATED
            assert refusal_of(error).code == "invalid_api_key"
    assert (await failure(keyed.raw("GetUsage", b"\xff"))).code() is grpc.StatusCode.UNAUTHENTICATED


async def test_what_a_tenant_may(keyed: BothDoors) -> None:
    assert (await keyed.stub.ListModels(pb.ListModelsRequest(), metadata=key("other"))).models == []
    error = await failure(keyed.stub.Complete(HELLO, metadata=key("other")))
    assert (error.code().name, refusal_of(error)) == ("PERMISSION_DENIED", Refusal("permission_denied", "model"))
    low = pb.GenerateRequest(prompt="a", max_tokens=1, priority=1)
    assert await refusal(keyed.stub.Complete(low, metadata=key("low"))) == Refusal("permission_denied", "priority")


async def test_limits_are_told_and_kept(keyed: BothDoors) -> None:
    call = keyed.stub.Complete(HELLO, metadata=key("few"))
    headers = dict(await call.initial_metadata())
    assert (headers["x-ratelimit-limit-requests"], headers["x-ratelimit-remaining-requests"]) == ("2", "1")
    assert int(headers["x-ratelimit-remaining-tokens"]) < 30
    await call
    await keyed.stub.Complete(HELLO, metadata=key("one"))
    for call in (
        keyed.stub.Complete(HELLO, metadata=key("one")),
        keyed.stub.Generate(HELLO, metadata=key("one")).read(),
    ):
        error = await failure(call)
        assert (error.code().name, refusal_of(error).code) == ("RESOURCE_EXHAUSTED", "rate_limit_exceeded")
        trailing = dict(error.trailing_metadata() or ())
        assert 50 <= int(trailing["retry-after"]) <= 60
        assert trailing["x-ratelimit-remaining-requests"] == "0"
        assert details_of(error, RetryInfo).retry_delay.seconds == int(trailing["retry-after"])
        assert details_of(error, ErrorInfo).reason == "RATE_LIMIT_EXCEEDED"
    (usage,) = (await keyed.stub.GetUsage(pb.GetUsageRequest(), metadata=key("one"))).tenants
    assert (usage.tenant, usage.requests, usage.rejected, usage.completion_tokens) == ("one", 1, 2, 3)
    everybody = (await keyed.stub.GetUsage(pb.GetUsageRequest(), metadata=key("root"))).tenants
    assert {each.tenant for each in everybody} >= {"one", "few"}
    (by_http,) = (await keyed.http.get("/v1/usage", headers=dict(key("one")))).json()["data"]
    assert (by_http["prompt_tokens"], len(by_http["hours"])) == (usage.prompt_tokens, len(usage.hours))


async def test_request_ids_and_what_is_kept_of_a_request(keyed: BothDoors) -> None:
    call = keyed.stub.Generate(HELLO, metadata=(*key("ann"), ("x-request-id", "mine-1")))
    responses = [response async for response in call]
    assert {response.request_id for response in responses} == {"mine-1"}
    assert dict(await call.initial_metadata())["x-request-id"] == "mine-1"
    record = keyed.router.service.explain.find("mine-1", "ann")
    assert record is not None
    record.preempted(0, "memory")
    account = await keyed.stub.GetRequest(pb.GetRequestRequest(id="mine-1"), metadata=key("ann"))
    assert account.attempts[0].preemptions[0].reason == "memory"
    assert (account.id, account.tenant, account.outcome, account.choices) == ("mine-1", "ann", "ok", 1)
    assert [(attempt.decode, attempt.ended) for attempt in account.attempts] == [("decode-0", "length")]
    by_http = (await keyed.http.get("/v1/requests/mine-1", headers=dict(key("ann")))).json()
    assert account_message(by_http, strict=True) == account
    assert json_format.MessageToDict(account, preserving_proto_field_name=True)["attempts"][0]["candidates"]
    other = keyed.stub.GetRequest(pb.GetRequestRequest(id="mine-1"), metadata=key("few"))
    assert await refusal(other) == Refusal("not_found", "id")
    assert (await keyed.stub.GetRequest(pb.GetRequestRequest(id="mine-1"), metadata=key("root"))).tenant == "ann"
    error = await failure(keyed.stub.Complete(pb.GenerateRequest(), metadata=(*key("ann"), ("x-request-id", "no id"))))
    assert len(str(dict(error.trailing_metadata() or ())["x-request-id"])) == 32


async def test_explain_comes_with_the_answer(doors: BothDoors) -> None:
    request = pb.GenerateRequest(prompt="Hello", max_tokens=2, explain=True)
    whole = await doors.stub.Complete(request)
    in_pieces = joined_stream(await streamed(doors.stub, request))
    embedded = await doors.stub.Embed(pb.EmbedRequest(input=[pb.EmbedInput(text="a")], explain=True))
    for answer in (whole, in_pieces, embedded):
        assert (answer.explain.id, answer.explain.outcome) == (answer.request_id, "ok")
        assert answer.explain.attempts[0].decode == "decode-0"
        assert answer.explain.output_tokens == answer.usage.completion_tokens
    assert not (await doors.stub.Complete(HELLO)).HasField("explain")


async def test_unknown_fields_are_told(doors: BothDoors) -> None:
    message = pb.GenerateRequest(
        chat=pb.ChatMessages(messages=[pb.ChatMessage(role="user", content="a")]), max_tokens=1
    )
    inner = pb.ChatMessage.FromString(message.chat.messages[0].SerializeToString() + b"\xf8\x3f\x01")
    message.chat.messages[0].CopyFrom(inner)
    call = doors.channel.unary_unary("/tandem.v1.Inference/Complete")(message.SerializeToString() + b"\xf8\x7f\x01")
    assert dict(await call.initial_metadata())["x-tandem-ignored"] == "field 2047, chat.messages[0].field 1023"
    assert (await doors.stub.Complete(HELLO).initial_metadata()).get("x-tandem-ignored") is None


async def test_contexts(house: House) -> None:
    with StoreNode(house.folder) as store:
        doors = await BothDoors.open(house, kv_store_address=store.address)
        stub = doors.stub
        request = pb.CreateContextRequest(name="manual", prompt_token_ids=pb.TokenIds(ids=range(7, 107)), ttl_s=60)
        created = await stub.CreateContext(request)
        assert (created.name, created.version, created.tokens) == ("manual", 1, 100)
        assert 50 <= created.expires_at - created.created_at <= 61
        (by_http,) = (await doors.http.get("/v1/contexts")).json()["data"]
        assert {name: getattr(created, name) for name in created.DESCRIPTOR.fields_by_name} == {
            name: value for name, value in by_http.items() if name != "object"
        }
        assert await stub.GetContext(pb.GetContextRequest(name="manual")) == created
        assert (await stub.ListContexts(pb.ListContextsRequest())).contexts == [created]
        doors.submitted()
        used = pb.GenerateRequest(prompt_token_ids=pb.TokenIds(ids=[5]), context="manual", max_tokens=1)
        await stub.Complete(used)
        assert list(doors.submitted()[0].prompt_token_ids) == [*range(7, 107), 5]
        chat = pb.ChatMessages(messages=[pb.ChatMessage(role="user", content="a")])
        assert (await stub.CreateContext(pb.CreateContextRequest(name="chat", chat=chat))).tokens > 1
        for call, expected in (
            (stub.CreateContext(pb.CreateContextRequest(name="manual")), Refusal("invalid_request", "input")),
            (stub.CreateContext(pb.CreateContextRequest(name="a/b", prompt="a")), Refusal("invalid_request", "name")),
            (stub.CreateContext(pb.CreateContextRequest(prompt="a")), Refusal("invalid_request", "name")),
            (
                stub.CreateContext(pb.CreateContextRequest(name="a", prompt="a", version=2**64 - 1)),
                Refusal("invalid_request", "version"),
            ),
            (
                stub.CreateContext(pb.CreateContextRequest(name="a", prompt="a", ttl_s=float("nan"))),
                Refusal("invalid_request", "ttl_s"),
            ),
            (stub.GetContext(pb.GetContextRequest(name="x")), Refusal("not_found", "context")),
        ):
            assert await refusal(call) == expected
        await stub.DeleteContext(pb.DeleteContextRequest(name="manual"))
        assert await refusal(stub.DeleteContext(pb.DeleteContextRequest(name="manual"))) == Refusal(
            "not_found", "context"
        )
        await doors.close()


MALFORMED = [
    ("Complete", b"\xff\xff\xff", None),
    ("Complete", HELLO.SerializeToString()[:-1], None),
    ("Complete", b"\x12\x02\xff\xfe", "prompt"),
    ("Complete", b"\x22\x06\x0a\x04\x12\x02a\xff", "chat.messages[0].content"),
    ("Complete", b"\x12\x01a\x72\x01b\x72\x01\xc0", "stop[1]"),
    ("Complete", b"", "input"),
    ("Complete", pb.GenerateRequest(prompt="a", temperature=float("nan")).SerializeToString(), "temperature"),
    ("Complete", pb.GenerateRequest(prompt="a", timeout_s=float("inf")).SerializeToString(), "timeout_s"),
    ("Complete", pb.GenerateRequest(prompt="a", timeout_s=-1).SerializeToString(), "timeout_s"),
    ("Complete", pb.GenerateRequest(prompt="a", logit_bias={3: float("inf")}).SerializeToString(), "logit_bias[3]"),
    ("Complete", pb.GenerateRequest(prompt="a", tool_mode=99).SerializeToString(), "tool_mode"),  # type: ignore[arg-type]
    ("Complete", pb.GenerateRequest(prompt="a", tools=[pb.Tool(name="f")]).SerializeToString(), "tools"),
    (
        "Complete",
        pb.GenerateRequest(chat=pb.ChatMessages(), context="c").SerializeToString(),
        "context",
    ),
    (
        "Complete",
        pb.GenerateRequest(prompt="a", structured_outputs=pb.StructuredOutputs()).SerializeToString(),
        "structured_outputs",
    ),
    (
        "Complete",
        pb.GenerateRequest(chat=pb.ChatMessages(), chat_template_kwargs="[" * 5000).SerializeToString(),
        "chat_template_kwargs",
    ),
    (
        "Complete",
        pb.GenerateRequest(chat=pb.ChatMessages(), tools=[pb.Tool(name="f", parameters="3")]).SerializeToString(),
        "tools[0].parameters",
    ),
    ("Embed", pb.EmbedRequest(pooling=7).SerializeToString(), "pooling"),  # type: ignore[arg-type]
    ("Tokenize", b"\x12\x01\x80", "text"),
    ("GetRequest", b"\x0a\x01\x80", "id"),
    ("DeleteContext", b"\x0a\x01\x80", "name"),
]


@pytest.mark.parametrize(("method", "message", "param"), MALFORMED)
async def test_malformed_messages(
    doors: BothDoors, method: str, message: bytes, param: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        error = await failure(doors.raw(method, message))
        stream = doors.channel.unary_stream("/tandem.v1.Inference/Generate")
        if method == "Complete":
            assert refusal_of(await failure(stream(message).read())) == refusal_of(error)
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert refusal_of(error) == Refusal("invalid_request", param)
    assert caplog.records == []
    if param:
        assert (error.details() or "").startswith(param)
        assert details_of(error, BadRequest).field_violations[0].field == param
    assert doors.submitted() == []


async def test_what_is_too_large_or_not_there(house: House) -> None:
    doors = await BothDoors.open(house, max_body_bytes=10_000)
    for message in (b"\x12\x90\x4f" + b"a" * 10_128, b"\xff" * 100_000):
        error = await failure(doors.raw("Complete", message))
        assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    bomb = doors.channel.unary_unary("/tandem.v1.Inference/Complete")
    error = await failure(bomb(b"\0" * 50_000_000, compression=grpc.Compression.Gzip))
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert (await failure(doors.raw("Nothing", b""))).code() is grpc.StatusCode.UNIMPLEMENTED
    error = await failure(doors.raw("Complete", b"", metadata=(("x-filler", "a" * 200_000),)))
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert (await doors.stub.Complete(HELLO)).choices
    await doors.close()


@pytest.mark.parametrize("field", [False, True])
async def test_deadline_frees_the_worker(doors: BothDoors, field: bool, caplog: pytest.LogCaptureFixture) -> None:
    doors.worker.script = Script(hold_after=1)
    request = pb.GenerateRequest(prompt="Hello", max_tokens=9, **({"timeout_s": 0.5} if field else {}))
    options = {} if field else {"timeout": 0.5}
    for number, make in enumerate((doors.stub.Complete, lambda *a, **k: drained(doors.stub.Generate(*a, **k)))):
        assert (await failure(make(request, **options))).code() is grpc.StatusCode.DEADLINE_EXCEEDED
        await until(lambda wanted=number + 1: len(doors.worker.cancelled_ids) == wanted)
    assert doors.worker.submits[0].timeout_s <= 0.5
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


async def drained(call: Any) -> None:
    while await call.read() is not grpc.aio.EOF:
        pass


@pytest.mark.parametrize("method", ["Generate", "Complete", "Embed"])
async def test_cancelling_frees_the_worker(
    doors: BothDoors, method: str, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    doors.worker.script = Script(mute=True)
    request = pb.EmbedRequest(input=[pb.EmbedInput(text="a")]) if method == "Embed" else HELLO
    call = getattr(doors.stub, method)(request)
    await until(lambda: doors.worker.submits)
    call.cancel()
    await until(lambda: doors.worker.cancelled_ids)
    await until(lambda: doors.router.accounts.usage.report("default")[0].requests == 1)
    metrics = doors.router.metrics.text().decode()
    assert f'tandem_router_requests_total{{endpoint="/tandem.v1.Inference/{method}",status="CANCELLED"}} 1.0' in metrics
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []
    assert "Traceback" not in capfd.readouterr().err


async def test_a_reader_that_stops_is_cut_off_and_others_go_on(
    doors: BothDoors, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generate, "STALLED_S", 0.5)
    doors.worker.script = Script(per_output=5, delay_s=0.005)
    options = [("grpc.http2.lookahead_bytes", 1 << 16), ("grpc.http2.bdp_probe", 0)]
    async with grpc.aio.insecure_channel(doors.grpc_target, options=options) as channel:
        request = pb.GenerateRequest(prompt="Hello", max_tokens=490, n=16, logprobs=20)
        stalled = channel.unary_stream("/tandem.v1.Inference/Generate")(request.SerializeToString())
        await stalled.read()
        await until(lambda: len(doors.worker.cancelled_ids) == 16)
        doors.worker.script = Script()
        assert (await doors.stub.Complete(HELLO)).usage.completion_tokens == 3
        error = await failure(drained(stalled))
        assert refusal_of(error) == Refusal("cancelled", None)
        assert "slowly" in (error.details() or "")


async def test_a_worker_error_is_a_status(doors: BothDoors) -> None:
    doors.worker.script = Script(error=("overloaded", "no room"))
    error = await failure(doors.stub.Complete(HELLO))
    assert (error.code().name, refusal_of(error).code) == ("RESOURCE_EXHAUSTED", "overloaded")
    assert dict(error.trailing_metadata() or ())["retry-after"] == "1"
    await doors.worker.kill()
    await until(lambda: not doors.router.fleet.decode)
    error = await failure(doors.stub.Complete(HELLO))
    assert (error.code().name, refusal_of(error).code) == ("UNAVAILABLE", "unavailable")


async def test_what_breaks_inside_is_internal_and_logged_once(
    doors: BothDoors, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(self: Any, delta: Any) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(grpc_generate._Answers, "of", broken)
    error = await failure(doors.stub.Complete(HELLO))
    assert (error.code().name, refusal_of(error).code) == ("INTERNAL", "internal")
    assert "ZeroDivision" not in (error.details() or "")
    assert [record.name for record in caplog.records if record.levelno >= logging.ERROR] == [
        "tandem.router.grpc_api.service"
    ]


async def test_large_messages_share_a_bound_with_bodies(doors: BothDoors, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(body_memory, "MAX_HELD_BYTES", 10_000)
    doors.worker.script = Script(hold_after=1)
    large = pb.GenerateRequest(prompt="a", max_tokens=2, stop=["x" * 900, "y" * 900])
    held = [doors.stub.Complete(large), asyncio.create_task(drained(doors.stub.Generate(large)))]
    await until(lambda: len(doors.worker.submits) == 2)
    assert await refusal(doors.stub.Complete(large)) == Refusal("overloaded", None)
    doors.worker.resume.set()
    await asyncio.gather(*held)
    assert body_memory.held_bytes() == 0
    assert (await doors.stub.Complete(large)).choices


async def test_what_is_no_grpc_harms_nobody(doors: BothDoors) -> None:
    host, _, port = doors.grpc_target.partition(":")
    for rubbish in (
        b"GET / HTTP/1.1\r\nHost: a\r\n\r\n",
        bytes(range(256)) * 40,
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\xff" * 3,
    ):
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(rubbish)
        while await reader.read(1 << 16):  # until the server hangs up
            pass
        writer.close()
        assert (await doors.stub.Complete(HELLO)).choices


async def test_many_calls_on_one_channel(doors: BothDoors) -> None:
    doors.worker.script = Script()
    answers = await asyncio.gather(*(doors.stub.Complete(HELLO) for _ in range(100)))
    assert len({answer.request_id for answer in answers}) == 100
