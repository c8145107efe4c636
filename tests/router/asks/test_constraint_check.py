"""Hostile grammars cost the process that checks them, never the router."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Literal

import httpx
import pytest

from tandem.common.errors import TandemError
from tandem.router.asks import constraint_check, constraints
from tandem.router.asks.constraint_check import Answer, ConstraintCheck, Question
from tandem.router.batch.exchange import batch_caller
from tandem.router.tenants.caller import ANYBODY, Caller
from tests.router.conftest import until
from tests.router.tool_models import bare_router, write_tool_model


@pytest.fixture(scope="module")
def model_with_tools(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tool_model(tmp_path_factory.mktemp("model") / "tiny", "hermes")


def rules_in_a_row(count: int) -> str:
    """A harmless language, whose rules the library follows by recursion."""
    rules = "".join(f'r{index}: "a" r{index + 1} | "b" r{index + 1}\n' for index in range(count))
    return f'start: r0\n{rules}r{count}: "x"'


async def problem(check: ConstraintCheck, kind: Literal["json_schema", "regex", "lark"], text: str) -> str:
    return (await check.answer(Question(kind, text), ANYBODY)).problem


async def test_what_overflows_the_stack_is_refused_and_the_next_check_goes_on() -> None:
    check = ConstraintCheck()
    assert await problem(check, "lark", rules_in_a_row(50)) == ""
    assert "nested too deeply" in await problem(check, "lark", rules_in_a_row(4000))
    assert await problem(check, "regex", "a+") == ""
    assert "unclosed group" in await problem(check, "regex", "(")


async def test_what_takes_too_long_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    doubled = "".join(f"A{index}: A{index + 1} A{index + 1}\n" for index in range(40))
    bomb = f'start: A0\n{doubled}A40: "x"'
    check = ConstraintCheck()
    bombs, harmless = await asyncio.gather(problem(check, "lark", bomb), problem(check, "regex", "b+"))
    assert ("too long" in bombs or "too big" in bombs, harmless) == (True, "")

    class Silent(ConstraintCheck):
        def _ask(self, question: Question, caller: str) -> Answer:
            raise AssertionError("the answer is known")

    check.__class__ = Silent
    assert await problem(check, "lark", bomb) == bombs


DYING = "import os, sys; sys.stdin.readline(); os.kill(os.getpid(), 9)"
ENDING = "import sys; sys.stdin.readline(); sys.exit(3)"
SILENT = "import sys; sys.stdin.readline(); sys.stdin.read()"


@pytest.mark.parametrize(
    ("code", "reason"), [(DYING, "status -9"), (ENDING, "status 3"), (SILENT, "cannot be checked within")]
)
async def test_what_ends_or_holds_up_the_process_is_refused(
    code: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constraint_check, "PATIENCE_S", 2.0)

    class Broken(ConstraintCheck):
        def _process(self, yields: bool) -> subprocess.Popen[bytes]:
            return subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    assert reason in await problem(Broken(), "regex", "a+")


async def test_a_process_that_died_between_two_questions_is_replaced() -> None:
    check = ConstraintCheck()
    assert await problem(check, "regex", "a+") == ""
    process = await check._work.run("default", 1.0, check._process, False)
    process.kill()
    for index in range(3):
        assert await problem(check, "regex", f"b{index}") == ""


class HeldCheck(ConstraintCheck):
    """A stand-in for the processes, which answers when it is let go; says whose turn it was."""

    def __init__(self) -> None:
        super().__init__()
        self.go = threading.Event()
        self.begun: list[str] = []

    def _ask(self, question: Question, caller: str) -> Answer:
        self.begun.append(question.text)
        assert self.go.wait(60)
        return Answer()


def asked(check: ConstraintCheck, tenant: str, text: str) -> asyncio.Task[Answer]:
    return asyncio.create_task(check.answer(Question("regex", text), Caller(tenant)))


async def test_a_tenant_waits_for_its_own_checks_only() -> None:
    check = HeldCheck()
    many = [asked(check, "many", f"m{index}") for index in range(24)]
    await until(lambda: len(check.begun) == constraint_check.SHARE)
    other = asked(check, "other", "o")
    await until(lambda: len(check.begun) == constraint_check.SHARE + 1)
    assert check.begun[-1] == "o", "a place is left, though 22 came earlier"
    third = asked(check, "third", "t")
    await until(lambda: check._work.waiting("third") == 1)
    check.go.set()
    await asyncio.gather(*many, other, third)
    assert check.begun.index("t") < len(check.begun) - 10, "its turn comes before theirs"


async def test_a_client_does_not_wait_behind_its_tenants_own_batch() -> None:
    """More checks than may wait: the batch's are refused and tried again, the client's is not."""
    check, tenant = HeldCheck(), Caller("acme")
    batch = [
        asyncio.create_task(check.answer(Question("regex", f"m{index}"), batch_caller(tenant)))
        for index in range(constraint_check.MAX_WAITING + 10)
    ]
    await until(lambda: len(check.begun) == constraint_check.SHARE)
    client = asked(check, "acme", "c")
    await until(lambda: "c" in check.begun)
    check.go.set()
    assert await client == Answer()
    await asyncio.gather(*batch, return_exceptions=True)


async def test_more_checks_of_a_tenant_than_may_wait_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constraint_check, "MAX_WAITING", 4)
    check = HeldCheck()
    tasks = [asked(check, "many", f"m{index}") for index in range(12)]
    await until(lambda: sum(task.done() for task in tasks) >= 6)
    other = asked(check, "other", "o")
    check.go.set()
    found = await asyncio.gather(*tasks, other, return_exceptions=True)
    refused = [each for each in found if not isinstance(each, Answer)]
    assert {(type(each), getattr(each, "code", "")) for each in refused} == {(TandemError, "overloaded")}
    assert isinstance(found[-1], Answer)


async def test_a_trivial_check_passes_beside_many_large_ones() -> None:
    """The real processes: how many of the others end before it, not how long it takes."""
    check = ConstraintCheck()
    large = json.dumps({f"property_{index}": {"type": "string", "maxLength": index + 1} for index in range(1500)})

    async def one(index: int) -> Answer:
        schema = f'{{"type": "object", "title": "{index}", "properties": {large}}}'
        return await check.answer(Question("json_schema", schema), Caller("many"))

    started = [check.answer(Question("regex", f"a{index}"), Caller(f"{index}")) for index in range(3)]
    await asyncio.gather(*started)  # the processes take longer to start than a check takes
    tasks = [asyncio.create_task(one(index)) for index in range(30)]
    await asyncio.sleep(0)
    assert (await check.answer(Question("regex", "a+"), Caller("other"))).problem == ""
    assert sum(task.done() for task in tasks) < len(tasks) / 2
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def overlapping_rules(count: int) -> str:
    rules = "".join(f'r{index}: "a"+ | "b" s | /[a-c]/ s\n' for index in range(count))
    return f'start: s\ns: {" | ".join(f"s r{index}" for index in range(count))} | "a"\n{rules}'


async def test_what_masks_cost_is_measured(bare_client: httpx.AsyncClient) -> None:
    for count in (400, 100):
        body = {"prompt": "a", "guided_grammar": overlapping_rules(count)}
        response = await bare_client.post("/v1/completions", json=body)
        assert response.status_code == 400
        assert response.json()["error"]["param"] == "guided_grammar"
        assert "to find what may come next" in response.json()["error"]["message"]
    response = await bare_client.post("/v1/completions", json={"prompt": "a", "guided_grammar": overlapping_rules(2)})
    assert response.status_code == 503, "it is good, and there is no worker"


async def test_the_number_of_answers_multiplies_what_masks_cost(
    bare_client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constraints, "ALL_MASKS_S", 1e-12)
    for path, said in (
        ("/v1/completions", {"prompt": ["a", "b"], "n": 8}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}], "n": 16}),
    ):
        response = await bare_client.post(path, json={**said, "guided_regex": "[a-z]{2,99}"})
        assert response.status_code == 400
        assert response.json()["error"]["param"] == "n"
        assert "makes 16 answers" in response.json()["error"]["message"]


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
async def test_a_bomb_is_a_400_that_names_the_field(bare_client: httpx.AsyncClient, path: str) -> None:
    said = {"prompt": "a"} if path == "/v1/completions" else {"messages": [{"role": "user", "content": "a"}]}
    response = await bare_client.post(path, json={**said, "guided_grammar": rules_in_a_row(4000)})
    assert (response.status_code, response.json()["error"]["param"]) == (400, "guided_grammar")


@pytest.mark.parametrize("depth", [100, 300, 480, 900, 5000])
@pytest.mark.parametrize("place", ["guided_json", "response_format", "tools", "chat_template_kwargs", "arguments"])
async def test_nesting_of_any_depth_is_no_500(model_with_tools: Path, place: str, depth: int) -> None:
    deep = '{"anyOf":[' * depth + '{"type":"string"}' + "]}" * depth
    fields = {
        "guided_json": f'"guided_json": {deep}',
        "response_format": f'"response_format": {{"type": "json_schema", "json_schema": {{"schema": {deep}}}}}',
        "tools": f'"tools": [{{"type": "function", "function": {{"name": "f", "parameters": {deep}}}}}]',
        "chat_template_kwargs": f'"chat_template_kwargs": {{"a": {deep}}}',
        "arguments": f'"x": 1, "messages": [{{"role": "assistant", "tool_calls": [{{"function": {{"name": "f", '
        f'"arguments": {json.dumps(deep)}}}}}]}}]',
    }
    body = f'{{"messages": [{{"role": "user", "content": "a"}}], {fields[place]}}}'
    async with bare_router(model_with_tools) as client:
        response = await client.post("/v1/chat/completions", content=body)
    assert response.status_code in (400, 503), response.text  # 503: it is good, and there is no worker
    assert response.json()["error"]["code"] != "internal"


async def test_who_sends_what_takes_long_asks_a_process_that_yields(monkeypatch: pytest.MonkeyPatch) -> None:
    """Others ask one that does not yield; no process is started for a single question."""
    monkeypatch.setattr(constraint_check, "PROCESSES", 1)
    readable = constraint_check._readable
    monkeypatch.setattr(
        constraint_check, "_readable", lambda process, s: s != constraint_check.PROMPT_S and readable(process, s)
    )
    check = ConstraintCheck()

    async def process(yields: bool) -> tuple[int, set[int]]:
        pid = (await check._work.run("default", 1.0, check._process, yields)).pid
        return pid, {os.getpriority(os.PRIO_PROCESS, int(each)) for each in os.listdir(f"/proc/{pid}/task")}

    mine = os.getpriority(os.PRIO_PROCESS, 0)
    yielding = {min(mine + constraint_check.YIELDING, 19)}
    pid, priorities = await process(False)
    assert priorities == {mine}
    assert await problem(check, "regex", "a+") == ""
    assert await process(True) == (pid, yielding)
    assert await problem(check, "regex", "b+") == ""
    assert await process(True) == (pid, yielding)

    monkeypatch.setattr(
        constraint_check, "_readable", lambda process, s: readable(process, constraint_check.PATIENCE_S)
    )
    other, priorities = await process(False)
    assert (other != pid, priorities) == (True, {mine})
    assert (await check.answer(Question("regex", "c+"), Caller("other"))).problem == ""
    assert (await process(False))[0] == other
    os.kill(pid, signal.SIGKILL)
    assert await problem(check, "regex", "d+") == ""
    replaced, priorities = await process(True)
    assert (replaced != pid, priorities) == (True, yielding), "and the next one yields, too"


async def test_what_was_asked_meanwhile_is_not_asked_again() -> None:
    check = HeldCheck()
    same = [asked(check, "many", "m") for _ in range(12)]
    await until(lambda: len(check.begun) == constraint_check.SHARE)
    check.go.set()
    assert await asyncio.gather(*same) == [Answer()] * 12
    assert check.begun == ["m"] * constraint_check.SHARE
