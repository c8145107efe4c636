"""Tenants at the front doors: what is refused and with which answer, what is told, and what is counted."""

from __future__ import annotations

import asyncio
import hashlib
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import httpx
import pytest

from tandem.common.errors import TandemError
from tandem.common.sampling import SamplingParams
from tandem.proto import inference_pb2 as pb
from tandem.proto import inference_pb2_grpc
from tandem.router.app import Router
from tandem.router.calls.accounts import Accounts
from tandem.router.calls.choice import ChoiceSpec
from tandem.router.calls.generate import Usage
from tandem.router.placing.dispatch import SequenceSpec
from tandem.router.tenants.caller import Caller, Rates
from tandem.router.text.served_model import Prompt
from tests.router.conftest import House, until
from tests.router.fake_worker import FakeWorker, Script

COMPLETIONS = "/v1/completions"
BODY = {"prompt": "a", "max_tokens": 3}


class Desk:
    """A router with a tenants' file."""

    def __init__(self, house: House, folder: Path) -> None:
        self._house = house
        self.file = folder / "tenants.yaml"
        self.worker: FakeWorker
        self.router: Router
        self._client: httpx.AsyncClient

    async def open(self, script: Script | None = None, **tenants: dict[str, Any]) -> None:
        self.write(**tenants)
        self.worker = await self._house.decode(script=script)
        self.router = await self._house.router(self.worker, tenants_file=self.file, grpc_port=0)
        self._client = await self._house.client(self.router)

    def write(self, **tenants: dict[str, Any]) -> None:
        lines = ["tenants:"]
        for name, fields in tenants.items():
            lines += [f" - name: {name}", f"   keys: [{hashlib.sha256(name.encode()).hexdigest()}]"]
            lines += [f"   {field}: {value}" for field, value in fields.items()]
        self.file.write_text("\n".join(lines))

    async def post(self, tenant: str, path: str = COMPLETIONS, **body: Any) -> httpx.Response:
        return await self._client.post(path, json={**BODY, **body}, headers={"authorization": f"Bearer {tenant}"})

    async def get(self, tenant: str, path: str) -> httpx.Response:
        return await self._client.get(path, headers={"authorization": f"Bearer {tenant}"})

    async def usage(self, tenant: str) -> dict[str, Any]:
        answer = await self.get(tenant, "/v1/usage")
        assert answer.status_code == 200
        return {usage["tenant"]: usage for usage in answer.json()["data"]}


@pytest.fixture
def desk(house: House, tmp_path: Path) -> Desk:
    return Desk(house, tmp_path)


def check_error(answer: httpx.Response, status: int, code: str, kind: str, param: str | None = None) -> str:
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert (error["code"], error["type"], error["param"]) == (code, kind, param)
    return str(error["message"])


async def test_a_limited_tenant_is_told_what_is_left_and_then_refused(desk: Desk) -> None:
    await desk.open(ann={"requests_per_minute": 2, "tokens_per_minute": 30}, bob={})  # 2 s for a token to come back
    first = await desk.post("ann")
    assert first.status_code == 200
    assert first.headers["x-ratelimit-limit-requests"] == "2"
    assert first.headers["x-ratelimit-remaining-requests"] == "1"
    assert first.headers["x-ratelimit-limit-tokens"] == "30"
    assert 30 - 1 - 3 <= int(first.headers["x-ratelimit-remaining-tokens"]) < 30
    assert first.headers["x-ratelimit-reset-requests"].endswith("s")
    streamed = await desk.post("ann", stream=True)
    assert streamed.headers["x-ratelimit-remaining-requests"] == "0"
    refused = await desk.post("ann")
    message = check_error(refused, 429, "rate_limit_exceeded", "rate_limit_error")
    assert "requests per minute" in message
    assert 1 <= int(refused.headers["retry-after"]) <= 30
    assert refused.headers["x-ratelimit-remaining-requests"] == "0"
    models = await desk.get("ann", "/v1/models")  # generates nothing, so it is not limited
    assert models.headers["x-ratelimit-limit-requests"] == "2"
    free = await desk.post("bob")
    assert free.status_code == 200
    assert not [name for name in free.headers if name.startswith("x-ratelimit")]
    assert len(desk.worker.submits) == 3


async def test_tokens_are_corrected_by_what_was_used(desk: Desk) -> None:
    await desk.open(ann={"tokens_per_minute": 600})
    for _ in range(2):
        answer = await desk.post("ann", prompt=[5] * 100, max_tokens=200)
        assert answer.status_code == 200
    refused = await desk.post("ann", prompt=[5] * 100, max_tokens=200)
    assert "tokens per minute" in check_error(refused, 429, "rate_limit_exceeded", "rate_limit_error")
    assert int(refused.headers["x-ratelimit-remaining-tokens"]) < 300


async def test_requests_in_flight_are_limited(desk: Desk) -> None:
    await desk.open(Script(hold_after=1), ann={"max_concurrent": 1}, bob={})
    running = asyncio.create_task(desk.post("ann"))
    await until(lambda: desk.worker.submits)
    check_error(await desk.post("ann"), 429, "rate_limit_exceeded", "rate_limit_error")
    desk.worker.resume.set()
    assert (await running).status_code == 200
    assert (await desk.post("ann")).status_code == 200


async def test_a_client_that_goes_away_frees_its_place(desk: Desk) -> None:
    await desk.open(Script(hold_after=1), ann={"max_concurrent": 1})
    running = asyncio.create_task(desk.post("ann"))
    await until(lambda: desk.worker.submits)
    running.cancel()
    await until(lambda: desk.worker.cancels)
    desk.worker.resume.set()
    assert (await desk.post("ann")).status_code == 200
    usage = (await desk.usage("ann"))["ann"]
    assert (usage["requests"], usage["failed"], usage["rejected"]) == (2, 0, 0)


async def test_models_and_priorities_that_are_not_allowed(desk: Desk) -> None:
    await desk.open(ann={"models": "[other]"}, bob={"priority_min": 3, "priority_max": 9}, cy={})
    check_error(await desk.post("ann"), 403, "permission_denied", "permission_error", "model")
    for path, body in (
        (COMPLETIONS, {}),
        ("/v1/chat/completions", {"prompt": None, "messages": [{"role": "user", "content": "a"}]}),
    ):
        refused = await desk.post("bob", path, priority=1, **body)
        check_error(refused, 403, "permission_denied", "permission_error", "priority")
        assert (await desk.post("bob", path, **body)).status_code == 200
    check_error(await desk.post("cy", priority=-1), 403, "permission_denied", "permission_error", "priority")
    assert (await desk.post("cy", priority=8)).status_code == 200
    assert [submit.priority for submit in desk.worker.submits] == [3, 3, 8]


async def test_keys_as_anthropics_clients_send_them(desk: Desk) -> None:
    await desk.open(ann={})
    for headers, status in (({"x-api-key": "ann"}, 200), ({"x-api-key": "bob"}, 401), ({}, 401)):
        answer = await desk._client.post(COMPLETIONS, json=BODY, headers=headers)
        assert answer.status_code == status


async def test_usage_of_a_tenant_and_of_all(desk: Desk) -> None:
    await desk.open(Script(cached_tokens=2), ann={"requests_per_minute": 2}, bob={}, boss={"admin": "true"})
    await desk.post("ann", prompt=[5, 6, 7, 8])
    await desk.post("ann", prompt=[5, 6, 7, 8], n=2, stream=True)
    await desk.post("ann")
    await desk.post("bob", prompt=[9])
    await desk.post("bob", prompt=[])  # never became a request
    own = await desk.usage("ann")
    assert list(own) == ["ann"]
    usage = own["ann"]
    assert (usage["requests"], usage["rejected"], usage["failed"]) == (2, 1, 0)
    assert (usage["prompt_tokens"], usage["completion_tokens"], usage["total_tokens"]) == (8, 9, 17)
    assert usage["prompt_tokens_details"]["cached_tokens"] == 4
    assert sum(hour["requests"] for hour in usage["hours"]) == 2
    everyone = await desk.usage("boss")
    assert set(everyone) == {"ann", "bob"}
    assert everyone["bob"]["prompt_tokens"] == 1
    metrics = await desk.get("boss", "/metrics")
    assert 'tandem_tenant_requests_total{process="router",outcome="served",tenant="ann"} 2.0' in metrics.text
    check_error(await desk.get("ann", "/metrics"), 403, "permission_denied", "permission_error")


async def test_metrics_are_closed_to_tenants_where_nobody_is_admin(desk: Desk, house: House, tmp_path: Path) -> None:
    await desk.open(ann={}, bob={})
    check_error(await desk.get("ann", "/metrics"), 403, "permission_denied", "permission_error")
    check_error(await desk.get("nobody", "/metrics"), 401, "invalid_api_key", "authentication_error")
    keys = tmp_path / "keys"
    keys.write_text(f"ann:{hashlib.sha256(b'ann').hexdigest()}\n")
    for settings, status in (({"api_keys_file": keys}, 403), ({"api_key": ["ann"]}, 200), ({}, 200)):
        client = await house.client(await house.router(desk.worker, **settings))  # type: ignore[arg-type]
        answer = await client.get("/metrics", headers={"authorization": "Bearer ann"})
        assert answer.status_code == status, settings


async def test_what_failed_before_any_output_is_free(desk: Desk) -> None:
    await desk.open(Script(error=("internal", "broken")), ann={"tokens_per_minute": 1000})
    for stream in (False, True):
        assert (await desk.post("ann", prompt=[5] * 50, stream=stream)).status_code == 500
    answer = await desk.get("ann", "/v1/models")
    assert answer.headers["x-ratelimit-remaining-tokens"] == "1000"
    usage = (await desk.usage("ann"))["ann"]
    assert (usage["requests"], usage["failed"], usage["prompt_tokens"]) == (2, 2, 0)


@pytest.mark.parametrize(
    ("code", "raised", "completion_tokens", "charged", "counted"),
    [
        ("", False, 7, 17, {"requests": 1, "completion_tokens": 7}),
        ("worker_lost", False, 7, 17, {"requests": 1, "completion_tokens": 7}),  # told inside a stream
        ("unavailable", False, 0, 0, {"requests": 1, "failed": 1}),
        ("unavailable", True, 0, 0, {"requests": 1, "failed": 1}),
        ("cancelled", True, 0, 10, {"requests": 1, "failed": 0}),  # the client went away, the prompt was computed
        ("overloaded", True, 0, 0, {"requests": 0}),  # the front door counts it
    ],
)
async def test_what_a_request_is_charged(
    code: str, raised: bool, completion_tokens: int, charged: int, counted: dict[str, int]
) -> None:
    accounts = Accounts()
    caller = Caller("ann", rates=Rates(tokens_per_minute=10**6))
    spec = ChoiceSpec(SequenceSpec(Prompt([1] * 10), SamplingParams(max_tokens=4), caller))
    charge = await accounts.open("tiny", [spec] * 3)
    error = TandemError(code, "text") if code else None
    if raised and error is not None:
        charge.fail(error)
    charge.close(Usage(10, completion_tokens), None if raised else error)
    (await accounts.open("tiny", [spec])).close(Usage(0, 0))
    (usage,) = accounts.usage.report("ann")
    assert usage.prompt_tokens + usage.completion_tokens == charged
    assert {name: getattr(usage, name) for name in counted} == {**counted, "requests": counted["requests"] + 1}


async def test_a_changed_file_holds_without_a_restart(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tandem.router.tenants.tenants.POLL_S", 0.01)
    await desk.open(ann={})
    assert (await desk.post("ann")).status_code == 200
    desk.write(bob={"max_concurrent": 1})
    await until(lambda: desk.router.tenants.roster.callers[0].tenant == "bob")
    assert (await desk.post("ann")).status_code == 401
    assert (await desk.post("bob")).status_code == 200


async def test_grpc_has_the_same_limits(desk: Desk) -> None:
    await desk.open(ann={"requests_per_minute": 1}, bob={"models": "[other]"})
    assert desk.router.grpc is not None
    request = pb.GenerateRequest(prompt="a", max_tokens=2)
    async with grpc.aio.insecure_channel(f"127.0.0.1:{desk.router.grpc.port}") as channel:
        stub: Any = inference_pb2_grpc.InferenceStub(channel)

        async def generate(tenant: str) -> list[Any]:
            return [part async for part in stub.Generate(request, metadata=(("authorization", f"Bearer {tenant}"),))]

        assert (await generate("ann"))[-1].usage.completion_tokens == 2
        for tenant, status, code in (
            ("ann", grpc.StatusCode.RESOURCE_EXHAUSTED, "rate_limit_exceeded"),
            ("bob", grpc.StatusCode.PERMISSION_DENIED, "permission_denied"),
            ("cy", grpc.StatusCode.UNAUTHENTICATED, "invalid_api_key"),
        ):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await generate(tenant)
            assert caught.value.code() is status
            metadata = dict(caught.value.trailing_metadata() or ())
            assert metadata["tandem-error"] == code
            assert ("retry-after" in metadata) == (code == "rate_limit_exceeded")
    usage = (await desk.usage("ann"))["ann"]
    assert (usage["requests"], usage["rejected"]) == (1, 1)
