"""`tandem chat`, `tandem status` and `tandem kv` against a server that answers as ours does."""

from __future__ import annotations

import io
import json
import os
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tandem.common.errors import ConfigError
from tandem.runtime import cli, kv, running
from tandem.runtime.running import announce, find_running, only_running

METRICS = """\
# TYPE tandem_router_sequences_in_flight gauge
tandem_router_sequences_in_flight 3.0
# TYPE tandem_router_completion_tokens counter
tandem_router_completion_tokens_total 40.0
# TYPE tandem_worker_running gauge
tandem_worker_running{target="unix:d",role="decode",worker="decode-0"} 3.0
# TYPE tandem_worker_free_blocks gauge
tandem_worker_free_blocks{target="unix:d",role="decode",worker="decode-0"} 25.0
# TYPE tandem_worker_total_blocks gauge
tandem_worker_total_blocks{target="unix:d",role="decode",worker="decode-0"} 100.0
"""
WORKER: dict[str, object] = {
    "role": "decode",
    "target": "unix:d",
    "worker": "decode-0",
    "connected": True,
    "draining": False,
    "problem": None,
    "row_invariant": True,
}


class Server:
    """Answers from `pages`, and streams `pieces` as a chat."""

    def __init__(self) -> None:
        worker = WORKER
        self.pages: dict[str, tuple[int, str]] = {
            "/readyz": (200, json.dumps({"status": "ready", "workers": [worker]})),
            "/v1/models": (200, json.dumps({"data": [{"id": "tiny"}]})),
            "/version": (200, json.dumps({"version": "1.2.3"})),
            "/metrics": (200, METRICS),
        }
        self.pieces = ["Hel", "lo."]
        self.cut = False
        self.asked: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        house = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                house.keys.append(self.headers["Authorization"])
                status, body = house.pages.get(self.path, (404, "nothing here"))
                self._reply(status, body)

            def do_POST(self) -> None:
                house.asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
                events = [json.dumps({"choices": [{"delta": {"content": piece}}]}) for piece in house.pieces]
                end = [] if house.cut else ["[DONE]"]
                self._reply(200, "".join(f"data: {event}\n\n" for event in (*events, *end)))

            def _reply(self, status: int, body: str) -> None:
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body.encode())

            def log_message(self, *_: object) -> None: ...

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Server]:
    monkeypatch.setattr(running, "scratch_roots", lambda: [tmp_path])
    for name in ("TANDEM_API_KEY", "OPENAI_API_KEY", "TANDEM_URL", "TANDEM_MODEL"):
        monkeypatch.delenv(name, raising=False)
    server = Server()
    thread = threading.Thread(target=server.http.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    yield server
    server.http.shutdown()
    server.http.server_close()
    thread.join()


def test_one_question_is_answered_on_standard_output(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    status = cli.main(["chat", "Who?", "--url", server.url, "--system", "Be brief.", "--max-tokens", "9"])
    assert (status, capsys.readouterr().out) == (0, "Hello.\n")
    (asked,) = server.asked
    assert [message["role"] for message in asked["messages"]] == ["system", "user"]
    assert (asked["model"], asked["max_tokens"]) == ("tiny", 9)
    assert "temperature" not in asked


def test_standard_input_is_one_question_where_it_is_no_terminal(
    server: Server, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("A line.\nAnother.\n"))
    assert cli.main(["chat", "--url", server.url]) == 0
    assert server.asked[0]["messages"][-1]["content"] == "A line.\nAnother."
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    assert cli.main(["chat", "--url", server.url]) == 2
    assert "no question" in capsys.readouterr().err


def test_a_conversation_has_a_memory_until_it_is_cleared(
    server: Server, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = iter(["first", "", "second", "/help", "/clear", "third", "/exit", "never"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    monkeypatch.setattr("sys.stdin", io.StringIO())
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    assert cli.main(["chat", "--url", server.url]) == 0
    said = [[message["content"] for message in asked["messages"]] for asked in server.asked]
    assert said == [["first"], ["first", "Hello.", "second"], ["third"]]
    assert "/clear" in capsys.readouterr().out


def test_a_broken_answer_is_said(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    server.cut = True
    assert cli.main(["chat", "Who?", "--url", server.url]) == 1
    assert "before it was whole" in capsys.readouterr().err


def test_keys_are_sent_and_a_refusal_is_plain(
    server: Server, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    server.pages["/v1/models"] = (401, json.dumps({"error": {"message": "Incorrect API key provided."}}))
    monkeypatch.setenv("OPENAI_API_KEY", "sk-other")
    assert cli.main(["chat", "Who?", "--url", server.url]) == 1
    assert cli.main(["chat", "Who?", "--url", server.url, "--api-key", "sk-mine"]) == 1
    assert server.keys == ["Bearer sk-other", "Bearer sk-mine"]
    said = capsys.readouterr().err
    assert "Incorrect API key provided. (--api-key, or TANDEM_API_KEY)" in said
    assert "sk-" not in said


def test_no_server_is_one_line(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("chat", "status"):
        arguments = ["hi"] if command == "chat" else []
        assert cli.main([command, *arguments, "--url", "127.0.0.1:1"]) == 1
        out, err = capsys.readouterr()
        assert "no server answers at http://127.0.0.1:1" in out + err
        assert len((out + err).splitlines()) == 1


def test_status_tells_of_workers_and_ends_with_1_where_nothing_is_served(
    server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["status", "--url", server.url, "--over-s", "0.01"]) == 0
    text = capsys.readouterr().out
    assert "is ready: tiny, Tandem 1.2.3" in text
    assert text.splitlines()[3].split() == ["decode-0", "decode", "3", "0", "75%"]
    assert "in flight 3, queued 0, 0 prompt and 0 output tokens/s" in text
    assert "bits" not in text
    worker = WORKER | {"draining": True, "row_invariant": False}
    away = WORKER | {"worker": None, "target": "10.0.0.4:9200", "connected": False, "problem": "UNAVAILABLE: refused"}
    server.pages["/readyz"] = (200, json.dumps({"status": "ready", "workers": [worker, away]}))
    assert cli.main(["status", "--url", server.url, "--over-s", "0"]) == 0
    text = capsys.readouterr().out
    assert "may depend on what runs beside it on decode-0" in text
    assert text.splitlines()[3].split() == ["decode-0", "decode", "3", "0", "75%", "draining"]
    assert text.splitlines()[4].split() == ["10.0.0.4:9200", "decode", "away", "UNAVAILABLE:", "refused"]
    server.pages["/readyz"] = (503, json.dumps({"status": "not ready", "workers": []}))
    assert cli.main(["status", "--url", server.url, "--json", "--over-s", "0"]) == 1
    told = json.loads(capsys.readouterr().out)
    assert (told["ready"], told["in_flight"], told["output_tokens_per_s"]) == (False, 3, None)


def test_a_running_server_is_found_and_several_are_listed(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert only_running("--url") is None
    for number in (1, 2):
        (tmp_path / f"tandem-{number}").mkdir()
    announce(tmp_path / "tandem-1", server.url, "tiny", "unix:/one", "")
    assert (tmp_path / "tandem-1" / "serve.json").stat().st_mode & 0o777 == 0o600
    assert cli.main(["chat", "Who?"]) == 0
    announce(tmp_path / "tandem-2", "http://127.0.0.1:2", "other", "unix:/two", "")
    with pytest.raises(ConfigError, match=r"--node unix:/one.*--node unix:/two"):
        kv.main(["stats"])
    assert cli.main(["status"]) == 2
    assert f"--url {server.url}" in capsys.readouterr().err


def test_what_is_left_of_a_dead_server_is_not_found(server: Server, tmp_path: Path) -> None:
    for number, change in enumerate(({"pid": 2**22 + 1}, {"started": 1.0}, {"new_field": 1})):
        (tmp_path / f"tandem-{number}").mkdir()
        announce(tmp_path / f"tandem-{number}", "http://x", "m", "", "")
        path = tmp_path / f"tandem-{number}" / "serve.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | change))
    (tmp_path / "tandem-9").mkdir()
    (tmp_path / "tandem-9" / "serve.json").write_text("{")
    assert find_running() == []


def test_kv_goes_to_the_node_of_the_running_server(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, bytes]] = []

    def channel(node: str, secret: bytes) -> Any:
        asked.append((node, secret))
        raise ConfigError("this is far enough")

    monkeypatch.setattr("tandem.kvstore.process.admin.open_channel", channel)
    secret = tmp_path / "secret"
    secret.write_text("s" * 32)
    secret.chmod(0o600)
    (tmp_path / "tandem-1").mkdir()
    announce(tmp_path / "tandem-1", server.url, "tiny", "unix:/one", str(secret))
    for arguments in (["stats"], ["stats", "--node=unix:/two"]):
        with pytest.raises(ConfigError, match="far enough"):
            kv.main(arguments)
    assert asked == [("unix:/one", b"s" * 32), ("unix:/two", b"")]
    with pytest.raises(ConfigError, match="stat5"):
        kv.main(["stat5"])
    announce(tmp_path / "tandem-1", server.url, "tiny", "", "")
    with pytest.raises(ConfigError, match="no store node"):
        kv.main(["stats"])
    assert os.getpid() == find_running()[0].pid
