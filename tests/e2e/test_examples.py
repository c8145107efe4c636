"""The numbered examples work as they are, with the files that they name; what the bundled model writes is English."""

from __future__ import annotations

import re
import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tandem.runtime.settings import BUNDLED_MODEL
from tests.e2e.conftest import ServeFactory
from tests.e2e.serving import Serve
from tests.ports import free_port

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
API_KEY = "operator-key"

Run = Callable[..., str]


@pytest.fixture(scope="module")
def grpc_port() -> int:
    return free_port()


@pytest.fixture(scope="module")
def platform(serves: ServeFactory, tmp_path_factory: pytest.TempPathFactory, grpc_port: int) -> Serve:
    """One for all of them: with the example's tenants, and a folder for batches."""
    storage = tmp_path_factory.mktemp("e2e-examples") / "storage"
    flags = ("--tenants-file", EXAMPLES / "tenants.yaml", "--storage", storage, "--grpc-port", grpc_port)
    return serves(BUNDLED_MODEL, *flags, api_key=API_KEY)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """run(name, serve, *flags): what the example prints. In this process: importing the client takes a second."""

    def run(name: str, serve: Serve, *flags: str) -> str:
        script = EXAMPLES / name
        where = [] if "--target" in flags else ["--base-url", f"{serve.url}/v1"]
        monkeypatch.setattr(sys, "argv", [str(script), *where, *flags])
        runpy.run_path(str(script), run_name="__main__")
        return capsys.readouterr().out.strip()

    return run


def test_every_example_is_listed_and_tested() -> None:
    listed = re.findall(r"^\| `(\d\d-[\w-]+\.py)`", (EXAMPLES / "README.md").read_text(), flags=re.MULTILINE)
    assert listed == sorted(path.name for path in EXAMPLES.glob("[0-9]*.py"))
    tested = Path(__file__).read_text()
    assert [name for name in listed if f'run("{name}"' not in tested] == []


def test_openai_client(run: Run, platform: Serve) -> None:
    printed = run("01-openai-client.py", platform, "--api-key", API_KEY)
    models, completion, chat, usage = re.split(r"\n\n", printed, maxsplit=3)
    assert models == "models: tandem-small"
    words = re.findall(r"[a-z]+", completion.removeprefix("completion: It was a dark evening, and").lower())
    common = {"the", "and", "of", "to", "a", "in", "he", "was", "that", "it", "his", "i", "had", "with", "as", "for"}
    assert len(words) >= 20
    assert sum(word in common for word in words) >= len(words) / 6, completion
    assert len(chat.removeprefix("chat: ").split()) >= 3
    assert re.search(r"\d+ prompt tokens, \d+ generated", usage)


def test_structured_output(run: Run, platform: Serve) -> None:
    setting, dark = run("02-structured-output.py", platform, "--api-key", API_KEY).splitlines()
    assert re.fullmatch(
        r"setting: \{'place': '(London|Paris|the sea)', 'year': 18\d\d, 'ghosts': (True|False)\}", setting
    )
    assert dark in ("dark: yes", "dark: no")


def test_tools(run: Run, platform: Serve) -> None:
    call, result, answer = run("03-tools.py", platform, "--api-key", API_KEY).split("\n", maxsplit=2)
    asked = re.fullmatch(r"call: get_weather \{'city': '(Paris|Rome)', 'days': ([1-9])\}", call)
    assert asked is not None, call
    assert result == f"result: {asked.group(1)}: sun for {asked.group(2)} days"
    assert answer.startswith("answer:")


def test_embeddings(run: Run, platform: Serve) -> None:
    printed = run("04-embeddings.py", platform, "--api-key", API_KEY)
    near, *others = map(float, re.findall(r"^  (-?\d\.\d{3})  ", printed, flags=re.MULTILINE))
    assert len(others) == 2
    assert 1 > near > max(others)


def test_batches(run: Run, platform: Serve) -> None:
    printed = run("05-batches.py", platform, "--api-key", API_KEY)
    assert printed.startswith("completed: 4 of 4 requests done, 0 failed\n")
    for name in ("Alice", "Bob", "Carol", "Dan"):
        assert f"\n{name}: " in printed
    headers = {"authorization": f"Bearer {API_KEY}"}
    assert platform.http.get("/v1/files", headers=headers).json()["data"] == []  # it tidies up


def test_tenants(run: Run, platform: Serve) -> None:
    limited, as_visitors, as_operator = re.split(r"\nusage, as \w+ sees it:\n", run("06-tenants.py", platform))
    *passed, refused, why = limited.splitlines()
    assert [line.rpartition(" requests and")[0] for line in passed] == [
        f"request {number}: 200, {3 - number} of 3" for number in (1, 2, 3)
    ]
    assert re.fullmatch(r"request 4: 429, try again in \d+ s", refused)
    assert "on requests per minute: the limit is 3" in why
    assert as_visitors.strip() == "visitors: 3 requests, 1 rejected, 6 prompt tokens, 15 generated"
    assert as_visitors.strip() in as_operator
    assert "acme: 1 requests, 0 rejected" in as_operator


def test_grpc(run: Run, platform: Serve, grpc_port: int) -> None:
    printed = run("08-grpc.py", platform, "--target", f"127.0.0.1:{grpc_port}", "--api-key", API_KEY)
    stream, usage, alike, ran, looked_up, call = printed.rsplit("\n", maxsplit=5)
    assert len(stream.removeprefix("stream:").split()) >= 5
    assert re.fullmatch(r"usage: \d+ prompt tokens, 24 generated", usage)
    assert -1 <= float(alike.removeprefix("alike: ")) <= 1
    assert ran.startswith("ran on: decode decode-0, ")
    assert re.fullmatch(r"looked up: request \S+ was ok", looked_up)
    assert re.fullmatch(r'call: get_weather \{"city": ?"(Paris|Rome)"\}', call)


def test_explain(run: Run, platform: Serve) -> None:
    printed = run("07-explain.py", platform, "--api-key", API_KEY)
    assert re.match(r"\d+ prompt tokens, done after \d+ ms\nran on: decode decode-0, ", printed)
    assert "candidate decode-0 with prefill-0, expected ms: total " in printed
    assert re.search(r"looked up: request \S+ was ok$", printed)
