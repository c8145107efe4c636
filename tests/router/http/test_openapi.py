"""`/openapi.json` is valid, complete and true: held against the routes, and against real answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import msgspec
import pytest
from openapi_spec_validator import validate

from tandem.common.errors import TandemError
from tandem.router.http.app import OPEN_PATHS, ROUTES, _methods, _route
from tandem.router.http.openapi import OPERATIONS, document
from tandem.router.http.openapi_answers import ANSWERS
from tests.router.conftest import House, events
from tests.router.fake_worker import Script

CHAT = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 3}
TEXT = {"prompt": "Hello", "max_tokens": 3}


@pytest.mark.parametrize("needs_key", [True, False])
def test_the_document_is_valid(needs_key: bool) -> None:
    made = document(needs_key=needs_key)
    validate(json.loads(msgspec.json.encode(made)))
    chat = made["paths"]["/v1/chat/completions"]["post"]
    assert bool(chat["security"]) == needs_key == ("401" in chat["responses"])
    assert made["paths"]["/healthz"]["get"]["security"] == []


def test_every_route_and_method_is_described_and_nothing_else() -> None:
    described: dict[str, set[str]] = {}
    for operation in OPERATIONS:
        described.setdefault(operation.path, set()).add(operation.method)
    for path, methods in described.items():
        real = {*_methods(path.replace("{id}", "x").replace("{name}", "x"))} - {"HEAD", "OPTIONS"}
        assert real == methods, path
    assert set(ROUTES) <= set(described)
    for prefix in ("/v1/models/", "/v1/requests/", "/v1/contexts/", "/v1/files/", "/v1/batches/"):
        assert any(path.startswith(prefix + "{") for path in described), prefix
    with pytest.raises(TandemError):
        _route("/v1/else/x")
    assert {operation.path for operation in OPERATIONS if operation.is_open} == OPEN_PATHS
    identifiers = [each["operationId"] for path in document(needs_key=True)["paths"].values() for each in path.values()]
    assert len(set(identifiers)) == len(identifiers)


def test_names_of_bodies_and_answers_do_not_meet() -> None:
    bodies = {operation.body for operation in OPERATIONS if operation.body is not None}
    _, schemas = msgspec.json.schema_components(bodies)
    assert not set(schemas) & set(ANSWERS)


class Checker:
    """Answers against the document."""

    def __init__(self, client: httpx.AsyncClient) -> None:
        self._client = client
        self._document = document(needs_key=False)
        self.seen: set[tuple[str, str]] = set()

    def check(self, schema: dict[str, Any], value: Any) -> None:
        whole = {**schema, "components": self._document["components"]}
        jsonschema.Draft202012Validator(whole).validate(value)
        name = schema.get("$ref", "").rpartition("/")[2]
        if name in ANSWERS and name != "Event":
            unknown = set(value) - set(ANSWERS[name]["properties"])
            assert not unknown or name == "Response", f"{name}: {unknown} is not described"

    async def call(self, method: str, path: str, status: int = 200, of: str | None = None, **options: Any) -> Any:
        """`of`: the path in the document, where it is another one."""
        answer = await self._client.request(method, path, **options)
        assert answer.status_code == status, answer.text
        described = self._document["paths"][of or path][method.lower()]["responses"][str(status)]["content"]
        kind = answer.headers["content-type"].partition(";")[0]
        self.seen.add((method, of or path))
        schema = described[kind]["schema"]
        if kind == "text/event-stream":
            text = "\n\n".join(part.rpartition("\n")[2] for part in answer.text.split("\n\n"))
            for event in events(text):
                if event != "[DONE]":
                    self.check(schema["contentSchema"], event)
            return None
        if kind == "application/json":
            self.check(schema, answer.json())
            return answer.json()
        return answer.text


async def test_real_answers_are_as_described(house: House, tmp_path: Path) -> None:
    worker = await house.decode(script=Script(cached_tokens=1))
    checker = Checker(await house.client(await house.router(worker, storage=tmp_path / "storage")))
    call = checker.call
    for extra in ({}, {"stream": True}):
        await call("POST", "/v1/completions", json={**TEXT, **extra, "logprobs": 1, "return_token_ids": True})
        await call("POST", "/v1/chat/completions", json={**CHAT, **extra, "logprobs": True})
        await call("POST", "/v1/responses", json={"input": "Hello", "max_output_tokens": 3, **extra})
        await call("POST", "/v1/messages", json={**CHAT, **extra})
    usage = {"stream": True, "stream_options": {"include_usage": True}}
    asks = {"x-tandem-explain": "1", "x-request-id": "why"}
    await call("POST", "/v1/chat/completions", json=CHAT | usage, headers=asks)
    await call("POST", "/v1/completions", json=TEXT, headers=asks)
    await call("GET", "/v1/requests/why", of="/v1/requests/{id}")
    await call("POST", "/v1/responses/input_tokens", json={"input": "Hello"})
    await call("POST", "/v1/messages/count_tokens", json={"messages": CHAT["messages"]})
    for form in ("float", "base64"):
        await call("POST", "/v1/embeddings", json={"input": ["Hello", "a"], "encoding_format": form})
    tokens = (await call("POST", "/tokenize", json={"prompt": "Hello", "return_token_strs": True}))["tokens"]
    await call("POST", "/detokenize", json={"tokens": tokens})
    line = {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": TEXT}
    upload = {"files": {"file": ("a.jsonl", json.dumps(line).encode())}, "data": {"purpose": "batch"}}
    file = (await call("POST", "/v1/files", **upload))["id"]
    await call("GET", "/v1/files")
    await call("GET", f"/v1/files/{file}", of="/v1/files/{id}")
    await call("GET", f"/v1/files/{file}/content", of="/v1/files/{id}/content")
    batch = {"input_file_id": file, "endpoint": "/v1/completions", "completion_window": "24h"}
    made = (await call("POST", "/v1/batches", json=batch))["id"]
    await call("GET", f"/v1/batches/{made}", of="/v1/batches/{id}")
    await call("GET", "/v1/batches")
    await call("GET", "/v1/models")
    await call("GET", "/v1/models/tiny", of="/v1/models/{id}")
    for path in ("/v1/usage", "/metrics", "/version", "/healthz", "/health", "/readyz", "/", "/docs", "/openapi.json"):
        await call("GET", path)
    spare = (await call("POST", "/v1/files", **upload))["id"]
    await call("DELETE", f"/v1/files/{spare}", of="/v1/files/{id}")
    not_called = {(operation.method, operation.path) for operation in OPERATIONS} - checker.seen
    assert {path.split("/")[2] for _, path in not_called} == {"contexts", "batches"}, not_called


async def test_errors_are_as_described(house: House) -> None:
    _, client = await house.pair(max_body_bytes=500)
    checker = Checker(client)
    for path in ("/v1/completions", "/v1/messages"):
        await checker.call("POST", path, 400, content=b"{")
        await checker.call("POST", path, 413, content=b"x" * 501)
        await checker.call("POST", path, 404, json={**TEXT, **(CHAT if path == "/v1/messages" else {}), "model": "x"})


@pytest.mark.parametrize(
    "path",
    ["/v1/completions", "/v1/chat/completions", "/v1/messages", "/v1/embeddings", "/v1/responses", "/detokenize"],
)
async def test_the_server_asks_for_what_the_document_says_is_required(
    bare_client: httpx.AsyncClient, path: str
) -> None:
    made = document(needs_key=False)
    body = made["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]["$ref"]
    required = made["components"]["schemas"][body.rpartition("/")[2]]["required"]
    answer = await bare_client.post(path, json={})
    assert answer.status_code == 400
    assert any(answer.json()["error"]["message"].startswith(f"{name} is required") for name in required), answer.text
