"""/v1/contexts and `context` in completions, against a real store node and a scripted worker that saves KV."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from tokenizers import Tokenizer, processors

from tandem.common.errors import TandemError
from tandem.kvstore.identity import Namespace, prefix_chain, request_namespace
from tandem.kvstore.interfaces import ObjectKey
from tandem.proto import worker_pb2
from tandem.router.placing import contexts
from tests.kvstore.store_node import CHUNK, StoreNode, arrive, hard_pins
from tests.router.conftest import House, until, write_model
from tests.router.fake_worker import NAMESPACE, FakeWorker, Script, counting_tokens

TOKENS = [7 + number % 300 for number in range(3 * CHUNK + 5)]


@pytest.fixture
def store(house: House) -> Iterator[StoreNode]:
    with StoreNode(house.folder) as store:
        yield store


class Saver:
    """What a worker saves: the full chunks of every prompt."""

    def __init__(self, store: StoreNode) -> None:
        self._store = store

    def __call__(self, submit: worker_pb2.Submit) -> list[int]:
        root = request_namespace(Namespace(NAMESPACE), submit.cache_salt)
        arrive(self._store.node, map(ObjectKey, prefix_chain(root, list(submit.prompt_token_ids), CHUNK)))
        return counting_tokens(submit)


async def open_pair(house: House, store: StoreNode, **settings: Any) -> tuple[FakeWorker, httpx.AsyncClient]:
    return await house.pair(Script(tokens=Saver(store)), kv_store_address=store.address, **settings)


def check_error(response: httpx.Response, status: int, code: str, param: str | None = "context") -> str:
    error = response.json()["error"]
    assert (response.status_code, error["code"], error["param"]) == (status, code, param), response.text
    return str(error["message"])


async def use(client: httpx.AsyncClient, name: str = "manual", **fields: Any) -> httpx.Response:
    body = {"prompt": [5, 6], "max_tokens": 2, "context": name, "return_token_ids": True, **fields}
    return await client.post("/v1/completions", json=body)


async def test_create_use_list_and_drop(house: House, store: StoreNode) -> None:
    worker, client = await open_pair(house, store)
    created = await client.post("/v1/contexts", json={"name": "manual", "prompt": TOKENS, "ttl_s": 60})
    assert created.status_code == 200, created.text
    context = created.json()
    assert (context["name"], context["version"], context["tokens"]) == ("manual", 1, len(TOKENS))
    assert context["resident_tokens"] == 3 * CHUNK
    assert 50 <= context["expires_at"] - context["created_at"] <= 61
    (submit,) = worker.submits
    assert (list(submit.prompt_token_ids), submit.sampling.max_tokens) == (TOKENS, 1)
    assert submit.exact_kv, "or it could not be saved"
    await until(lambda: hard_pins(store.node) == 3)
    assert (await client.get("/v1/contexts/manual")).json() == context
    assert (await client.get("/v1/contexts")).json() == {"object": "list", "data": [context]}

    answer = (await use(client)).json()
    assert list(worker.submits[-1].prompt_token_ids) == [*TOKENS, 5, 6]
    assert worker.submits[-1].cache_salt == submit.cache_salt
    assert not worker.submits[-1].exact_kv
    assert answer["usage"]["prompt_tokens"] == len(TOKENS) + 2
    assert answer["choices"][0]["prompt_token_ids"] == [*TOKENS, 5, 6]
    await use(client, prompt=[[5], [6, 7]])
    assert [list(each.prompt_token_ids) for each in worker.submits[-2:]] == [[*TOKENS, 5], [*TOKENS, 6, 7]]

    assert (await client.post("/v1/contexts", json={"name": "manual", "prompt": [9]})).json()["version"] == 2
    await use(client)  # the router does not remember the old version
    assert list(worker.submits[-1].prompt_token_ids) == [9, 5, 6]
    dropped = await client.delete("/v1/contexts/manual")
    assert dropped.json() == {"name": "manual", "object": "context", "deleted": True}
    for response in (
        await use(client),
        await client.delete("/v1/contexts/manual"),
        await client.get("/v1/contexts/manual"),
    ):
        assert "`manual`" in check_error(response, 404, "not_found")
    assert hard_pins(store.node) == 0
    assert (await client.put("/v1/contexts/manual")).headers["allow"] == "GET, HEAD, DELETE, OPTIONS"


async def test_kv_that_was_lost_is_computed_from_the_recipe_saved_and_pinned(house: House, store: StoreNode) -> None:
    worker, client = await open_pair(house, store)
    await client.post("/v1/contexts", json={"name": "manual", "prompt": TOKENS})
    store.node.commands.clear()
    assert (await client.get("/v1/contexts/manual")).json()["resident_tokens"] == 0
    assert hard_pins(store.node) == 0
    assert (await use(client)).status_code == 200
    assert list(worker.submits[-1].prompt_token_ids) == [*TOKENS, 5, 6]
    assert (await client.get("/v1/contexts/manual")).json()["resident_tokens"] == 3 * CHUNK
    await until(lambda: hard_pins(store.node) == 3)


async def test_the_recipe_outlives_the_store_node_and_its_absence_touches_nobody_else(
    house: House, store: StoreNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(contexts, "REMEMBERED_S", 0.0)
    worker, client = await open_pair(house, store)
    await client.post("/v1/contexts", json={"name": "manual", "prompt": TOKENS})
    await asyncio.to_thread(store.stop)
    try:
        for response in (
            await use(client),
            await client.get("/v1/contexts"),
            await client.get("/v1/contexts/manual"),
            await client.post("/v1/contexts", json={"name": "other", "prompt": [1]}),
            await client.delete("/v1/contexts/manual"),
        ):
            check_error(response, 503, "unavailable", None)
            assert int(response.headers["retry-after"]) >= 1
        worker.script.tokens = counting_tokens
        assert (await client.post("/v1/completions", json={"prompt": [5]})).status_code == 200
    finally:
        await asyncio.to_thread(store.start)

    worker.script.tokens = Saver(store)
    answers = [await use(client)]
    async with asyncio.timeout(30):
        while answers[-1].status_code != 200:
            check_error(answers[-1], 503, "unavailable", None)
            answers.append(await use(client))
    assert list(worker.submits[-1].prompt_token_ids) == [*TOKENS, 5, 6]
    assert (await client.get("/v1/contexts/manual")).json()["resident_tokens"] == 3 * CHUNK


async def test_a_store_node_that_hangs_delays_nobody_else(
    house: House, store: StoreNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(contexts, "CALL_S", 0.5)
    silent = await asyncio.start_unix_server(lambda reader, writer: reader.read(), house.folder / "silent.sock")
    _, client = await house.pair(kv_store_address=f"unix:{house.folder}/silent.sock")
    waiting = asyncio.create_task(use(client))
    plain = await client.post("/v1/completions", json={"prompt": [5]})
    assert plain.status_code == 200
    assert not waiting.done()
    check_error(await waiting, 503, "unavailable", None)
    silent.close()


async def test_a_store_node_that_is_slow_to_connect_is_waited_for(house: House, store: StoreNode) -> None:
    async def copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while content := await reader.read(1 << 16):
            writer.write(content)
        writer.close()

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(0.4)
        inner_reader, inner_writer = await asyncio.open_unix_connection(store.address.removeprefix("unix:"))
        await asyncio.gather(copy(reader, inner_writer), copy(inner_reader, writer))

    slow = await asyncio.start_unix_server(connected, house.folder / "slow.sock")
    client = contexts.ContextClient(f"unix:{house.folder}/slow.sock")
    assert await client.list("acme") == []
    await client.close()
    slow.close()


async def test_a_text_prompt_after_a_context_has_no_second_bos(house: House, store: StoreNode) -> None:
    house.model = write_model(house.folder / "tiny")
    tokenizer = Tokenizer.from_file(str(house.model / "tokenizer.json"))
    bos = tokenizer.token_to_id("<|endoftext|>")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", bos)]
    )
    tokenizer.save(str(house.model / "tokenizer.json"))
    worker, client = await open_pair(house, store)
    await client.post("/v1/contexts", json={"name": "manual", "prompt": "The river"})
    await use(client, prompt=" ran past")
    await use(client, prompt=[" ran past"])
    await client.post("/v1/completions", json={"prompt": "The river"})
    before, once, listed, plain = [list(submit.prompt_token_ids) for submit in worker.submits]
    assert before == plain
    assert before[0] == bos
    assert once == listed
    assert once[: len(before)] == before
    assert bos not in once[1:]
    assert tokenizer.decode(once) == "The river ran past"
    echoed = (await use(client, prompt=" ran past", echo=True, max_tokens=1)).json()
    assert echoed["choices"][0]["text"].startswith("The river ran past")


async def test_messages_are_rendered_by_the_template(house: House, store: StoreNode) -> None:
    worker, client = await open_pair(house, store)
    messages = [{"role": "system", "content": "Hello"}]
    created = await client.post("/v1/contexts", json={"name": "system", "messages": messages})
    assert created.status_code == 200, created.text
    tokens = (await client.post("/tokenize", json={"messages": messages, "add_generation_prompt": False})).json()[
        "tokens"
    ]
    assert list(worker.submits[-1].prompt_token_ids) == tokens


async def test_tenants_see_only_their_own(house: House, store: StoreNode, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("".join(f"{name}:{hashlib.sha256(name.encode()).hexdigest()}\n" for name in ("ann", "bob")))
    worker, client = await open_pair(house, store, api_keys_file=keys)
    ann, bob = ({"authorization": f"Bearer {name}"} for name in ("ann", "bob"))
    assert (await client.get("/v1/contexts")).status_code == 401
    body = {"name": "manual", "prompt": TOKENS}
    assert (await client.post("/v1/contexts", json=body, headers=ann)).status_code == 200
    use_it = {"prompt": [5], "context": "manual"}
    unknown = await client.get("/v1/contexts/nobodys", headers=bob)
    for response in (
        await client.get("/v1/contexts/manual", headers=bob),
        await client.delete("/v1/contexts/manual", headers=bob),
        await client.post("/v1/completions", json=use_it, headers=bob),
    ):
        message = check_error(response, 404, "not_found")
        assert message.replace("manual", "nobodys") == unknown.json()["error"]["message"]
    assert (await client.get("/v1/contexts", headers=bob)).json()["data"] == []
    assert (await client.post("/v1/contexts", json=body | {"prompt": [3]}, headers=bob)).status_code == 200
    assert (await client.post("/v1/completions", json=use_it, headers=ann)).status_code == 200
    assert list(worker.submits[-1].prompt_token_ids) == [*TOKENS, 5]
    assert (await client.post("/v1/completions", json=use_it, headers=bob)).status_code == 200
    assert list(worker.submits[-1].prompt_token_ids) == [3, 5]


async def test_a_tenant_that_takes_all_it_can_leaves_room_for_others(
    house: House, store: StoreNode, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tandem.kvstore.contexts.contexts.MAX_CONTEXTS", 4)
    keys = tmp_path / "keys"
    keys.write_text("".join(f"{name}:{hashlib.sha256(name.encode()).hexdigest()}\n" for name in ("ann", "bob")))
    worker, client = await open_pair(house, store, api_keys_file=keys)
    ann, bob = ({"authorization": f"Bearer {name}"} for name in ("ann", "bob"))
    for number in range(2):
        body = {"name": f"c{number}", "prompt": [1]}
        assert (await client.post("/v1/contexts", json=body, headers=ann)).status_code == 200
    worker.submits.clear()
    refused = await client.post("/v1/contexts", json={"name": "c2", "prompt": [1]}, headers=ann)
    message = check_error(refused, 400, "invalid_request", "name")
    assert "the limits of ann are now 2 contexts" in message
    assert worker.submits == []
    assert (await client.post("/v1/contexts", json={"name": "mine", "prompt": [1]}, headers=bob)).status_code == 200


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"name": "a/b"}, "name"),
        ({"name": 3}, "name"),
        ({"prompt": None}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [512]}, "prompt"),
        ({"messages": [{"role": "user", "content": "x"}]}, "prompt"),
        ({"ttl_s": 0}, "ttl_s"),
        ({"ttl_s": 31 * 86400}, "ttl_s"),
        ({"ttl_s": -1}, "ttl_s"),
        ({"ttl_s": 0.1}, "ttl_s"),
        ({"ttl_s": 1e300}, "ttl_s"),
        ({"version": 0}, "version"),
    ],
)
async def test_wrong_fields_are_named(house: House, store: StoreNode, changes: dict[str, Any], param: str) -> None:
    worker, client = await open_pair(house, store)
    response = await client.post("/v1/contexts", json={"name": "manual", "prompt": [1]} | changes)
    check_error(response, 400, "invalid_request", param)
    assert worker.submits == []


async def test_an_old_version_and_too_many_tokens_are_refused(house: House, store: StoreNode) -> None:
    _, client = await open_pair(house, store)
    body = {"name": "manual", "prompt": [1, 2], "version": 5}
    for _ in range(2):  # the second is a retry
        assert (await client.post("/v1/contexts", json=body)).json()["version"] == 5
    response = await client.post("/v1/contexts", json=body | {"prompt": [3]})
    check_error(response, 400, "invalid_request", "version")
    response = await client.post("/v1/contexts", json=body | {"prompt": [1] * 600, "version": 6})
    check_error(response, 400, "context_length_exceeded", "prompt")
    check_error(await use(client, prompt=[1] * 511), 400, "context_length_exceeded", "prompt")
    check_error(await use(client, cache_salt="mine"), 400, "invalid_request", "cache_salt")
    assert (await client.get("/v1/contexts/manual")).json()["version"] == 5


async def test_a_context_of_another_model_is_not_used(house: House, store: StoreNode) -> None:
    _, client = await open_pair(house, store)
    await client.post("/v1/contexts", json={"name": "manual", "prompt": TOKENS})
    other = await house.decode("decode-1", namespace=b"o" * 32)
    newer = await house.client(await house.router(other, kv_store_address=store.address))
    assert "another model" in check_error(await use(newer), 404, "not_found")


async def test_without_a_store_node_the_setting_is_named(house: House) -> None:
    _, client = await house.pair()
    for response in (
        await use(client),
        await client.get("/v1/contexts"),
        await client.post("/v1/contexts", json={"name": "manual", "prompt": [1]}),
    ):
        assert "kv_store_address" in check_error(response, 404, "not_found")
    chat = await client.post(
        "/v1/chat/completions", json={"messages": [{"role": "user", "content": "x"}], "context": "manual"}
    )
    check_error(chat, 400, "invalid_request")


async def test_recipes_are_remembered_briefly_and_within_bounds(
    house: House, store: StoreNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(contexts, "MAX_REMEMBERED_TOKENS", 10)
    client = contexts.ContextClient(store.address)
    for number in range(4):
        await client.put("acme", f"c{number}", [1, 2], root=b"r" * 32, ttl_s=60, version=0)
    recipes = [await client.recipe("acme", f"c{number}") for number in range(4)]
    assert [list(recipe.token_ids) for recipe in recipes] == [[1, 2]] * 4
    await asyncio.to_thread(store.stop)
    try:
        assert await client.recipe("acme", "c3") is recipes[3]
        for number in (0, 1):  # only the last two fit
            with pytest.raises(TandemError, match="does not answer"):
                await client.recipe("acme", f"c{number}")
        monkeypatch.setattr(contexts, "REMEMBERED_S", 0.0)
        with pytest.raises(TandemError, match="does not answer"):
            await client.recipe("acme", "c3")
    finally:
        await client.close()
        await asyncio.to_thread(store.start)
