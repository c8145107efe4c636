"""Hostile grammars cost the process that checks them, never the router."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from pathlib import Path
from typing import Literal

import httpx
import pytest

from tandem.common.errors import TandemError
from tandem.router import constraint_check
from tandem.router.constraint_check import Answer, ConstraintCheck, Question
from tests.router.tool_models import bare_router, write_tool_model


@pytest.fixture(scope="module")
def model_with_tools(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tool_model(tmp_path_factory.mktemp("model") / "tiny", "hermes")


def rules_in_a_row(count: int) -> str:
    """A harmless language, whose rules the library follows by recursion."""
    rules = "".join(f'r{index}: "a" r{index + 1} | "b" r{index + 1}\n' for index in range(count))
    return f'start: r0\n{rules}r{count}: "x"'


async def problem(check: ConstraintCheck, kind: Literal["json_schema", "regex", "lark"], text: str) -> str:
    return (await check.answer(Question(kind, text))).problem


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
        def _ask(self, question: Question) -> Answer:
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
        def _process(self) -> subprocess.Popen[bytes]:
            return subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    assert reason in await problem(Broken(), "regex", "a+")


async def test_a_process_that_died_between_two_questions_is_replaced() -> None:
    check = ConstraintCheck()
    assert await problem(check, "regex", "a+") == ""
    process = await asyncio.get_running_loop().run_in_executor(check._threads, check._process)
    process.kill()
    for index in range(3):
        assert await problem(check, "regex", f"b{index}") == ""


async def test_no_more_wait_than_the_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constraint_check, "MAX_WAITING", 2)
    check = ConstraintCheck()
    found = await asyncio.gather(
        *(problem(check, "regex", "a" * (1 + index)) for index in range(5)), return_exceptions=True
    )
    assert [answer for answer in found if isinstance(answer, str)] == ["", ""]
    refused = [answer for answer in found if not isinstance(answer, str)]
    assert [(type(answer), getattr(answer, "code", "")) for answer in refused] == [(TandemError, "overloaded")] * 3


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
