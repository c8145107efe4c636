"""A real `tandem serve` for end-to-end tests: started as a user would, looked at through HTTP and the process table."""

from __future__ import annotations

import json
import os
import queue
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx
import psutil
import yaml

READY_S = 180.0
BACK_S = 180.0
"""For a worker to be there again where others use the cores, too."""


def eventually(condition: Callable[[], Any], timeout_s: float = 180.0, what: str = "") -> Any:
    """The first true value of `condition`, polled; fails after `timeout_s`."""
    end = time.monotonic() + timeout_s
    while not (value := condition()):
        if time.monotonic() > end:
            raise AssertionError(f"not within {timeout_s:g} s: {what or condition}")
        time.sleep(0.02)
    return value


def tandem_command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "tandem.runtime.cli", *map(str, arguments)]


def environment(**extra: str) -> dict[str, str]:
    """Without settings that the developer may have in the shell."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("TANDEM_", "OTEL_"))}
    return kept | extra


def data_lines(answer: httpx.Response) -> Iterator[str]:
    """Data of a stream's events. httpx's lines also end at characters that a random model writes, such as U+2028."""
    rest = b""
    for part in answer.iter_bytes():
        *lines, rest = (rest + part).split(b"\n")
        yield from (line.removeprefix(b"data: ").decode() for line in lines if line.startswith(b"data: "))


def ask(http: httpx.Client, model: str, question: dict[str, Any], *, stream: bool) -> list[tuple[str, list[int], str]]:
    """Text, tokens and finish reason of each choice. Raises AssertionError for an answer that is not whole."""
    body = {"model": model, "temperature": 0, "ignore_eos": True, "return_token_ids": True} | question
    choices: dict[int, tuple[str, list[int], str]] = {}
    if not stream:
        answer = http.post("/v1/completions", json=body)
        assert answer.status_code == 200, answer.text
        for choice in answer.json()["choices"]:
            choices[choice["index"]] = (choice["text"], choice["token_ids"], choice["finish_reason"])
    else:
        with http.stream("POST", "/v1/completions", json=body | {"stream": True}) as answer:
            assert answer.status_code == 200, answer.read()
            lines = list(data_lines(answer))
        assert lines[-1] == "[DONE]", lines[-1]
        for choice in (choice for line in lines[:-1] for choice in json.loads(line)["choices"]):
            text, tokens, _ = choices.get(choice["index"], ("", [], ""))
            new = choice.get("token_ids") or []
            choices[choice["index"]] = (text + choice["text"], tokens + new, choice["finish_reason"] or "")
    return [choices[index] for index in sorted(choices)]


KINDS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.9, "seed": 5, "top_p": 0.9},
    {"temperature": 0.7, "seed": 6, "presence_penalty": 0.8, "repetition_penalty": 1.1},
    {"logprobs": 1},
    {"temperature": 0.8, "n": 2, "seed": 7},
]
"""Requests that are answered alike however often their worker changes: greedy, drawn, penalised, scored, several."""


class Askers:
    """Clients that ask without a pause, each answer compared. The `with` block ends when the last answer is there, and
    fails if one was missing or wrong."""

    wait_s = 180.0
    """For more answers."""
    end_s = 180.0
    """For each client to end."""

    def __init__(self, count: int) -> None:
        self.answered = 0
        self.wrong: list[str] = []
        self._stopping = threading.Event()
        self._lock = threading.Lock()
        self._threads = [threading.Thread(target=self._run, args=(i,), daemon=True) for i in range(count)]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        for thread in self._threads:
            thread.join(self.end_s)
        assert not any(thread.is_alive() for thread in self._threads)
        assert not self.wrong, f"{len(self.wrong)} of {self.answered}: {self.wrong[:3]}"

    def wait(self, answers: int) -> None:
        """For so many more."""
        goal = self.answered + answers
        eventually(lambda: self.answered >= goal or self.wrong, self.wait_s, f"{answers} more answers")

    def _run(self, number: int) -> None:
        """Client `number`: until `_stopping` is set, each answer into `answered` and what is wrong into `wrong`."""
        raise NotImplementedError


class Serve:
    """`with Serve(model, "--dtype", "float32") as serve:`; `serve.url` answers."""

    def __init__(self, model: Path, *arguments: object, api_key: str = "", **variables: str) -> None:
        """`api_key`: where the arguments ask for one, what `serve.http` sends."""
        self._headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
        self.process = subprocess.Popen(
            tandem_command("serve", "--model", model, "--port", 0, *arguments),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment(**variables),
        )
        self.log: list[str] = []
        self._output: queue.Queue[str] = queue.Queue()
        assert self.process.stdout is not None
        assert self.process.stderr is not None
        for stream, take in ((self.process.stdout, self._output.put), (self.process.stderr, self.log.append)):
            threading.Thread(target=_pump, args=(stream, take), daemon=True).start()

    def __enter__(self) -> Serve:
        line = ""
        end = time.monotonic() + READY_S
        while not line.startswith("Tandem is ready"):
            try:
                line = self._output.get(timeout=0.1)
            except queue.Empty:
                if self.process.poll() is not None or time.monotonic() > end:
                    self.process.kill()
                    raise AssertionError("serve did not become ready:\n" + "\n".join(self.log[-40:])) from None
        found = re.search(r"http://\S+", line)
        assert found is not None, line
        self.url = found.group()
        self.http = httpx.Client(base_url=self.url, headers=self._headers, timeout=180.0, trust_env=False)
        self.model = self.http.get("/v1/models").json()["data"][0]["id"]
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.http.close()
        children = self.children()
        self.process.terminate()
        try:
            self.process.wait(timeout=180.0)
        except subprocess.TimeoutExpired:
            self.process.kill()
            for child in children.values():
                child.kill()
            raise
        if kind is not None:
            print("\n".join(self.log[-60:]))

    # Processes

    def children(self) -> dict[str, psutil.Process]:
        """Running children by name, such as decode-0."""
        found = {}
        try:
            processes = psutil.Process(self.process.pid).children()
        except psutil.NoSuchProcess:
            return {}
        for process in processes:
            try:
                command = " ".join(process.cmdline())
            except psutil.Error:
                continue
            if (name := re.search(r"/([a-z]+(-\d+)?)\.yaml", command)) is not None:
                found[name.group(1)] = process
        return found

    def kill(self, name: str) -> None:
        self.children()[name].send_signal(signal.SIGKILL)

    # Requests

    def complete(self, prompt: list[int] | str, max_tokens: int = 16, **fields: Any) -> dict[str, Any]:
        """The body of a greedy completion that goes on to `max_tokens`."""
        answer = self.http.post("/v1/completions", json=self._body(prompt, max_tokens, fields))
        assert answer.status_code == 200, answer.text
        body: dict[str, Any] = answer.json()
        return body

    def tokens(self, prompt: list[int], max_tokens: int = 16, **fields: Any) -> list[int]:
        tokens: list[int] = self.complete(prompt, max_tokens, **fields)["choices"][0]["token_ids"]
        return tokens

    def stream(
        self, prompt: list[int] | str, max_tokens: int = 16, headers: dict[str, str] | None = None, **fields: Any
    ) -> Iterator[dict[str, Any]]:
        """The events of a streaming completion, `[DONE]` left out. Close the iterator to disconnect."""
        body = self._body(prompt, max_tokens, fields) | {"stream": True}
        with self.http.stream("POST", "/v1/completions", json=body, headers=headers) as answer:
            assert answer.status_code == 200, answer.read()
            for line in data_lines(answer):
                if line != "[DONE]":
                    yield json.loads(line)

    def _body(self, prompt: list[int] | str, max_tokens: int, fields: dict[str, Any]) -> dict[str, Any]:
        return {
            "model": self.model,
            "prompt": prompt,
            "max_tokens": max_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "return_token_ids": True,
            **fields,
        }

    # Metrics

    def metric(self, name: str, **labels: str) -> float:
        """The sum over all series of `name` with these labels; 0 without any."""
        total = 0.0
        for line in self.http.get("/metrics").text.splitlines():
            series, _, value = line.rpartition(" ")
            if re.split(r"[{ ]", series, maxsplit=1)[0] == name and all(
                f'{key}="{wanted}"' in series for key, wanted in labels.items()
            ):
                total += float(value)
        return total

    def node(self) -> str:
        """Address of the store node."""
        (config,) = (part for part in self.children()["kvstore"].cmdline() if part.endswith("kvstore.yaml"))
        return str(yaml.safe_load(Path(config).read_text())["listen"])

    def store_stats(self) -> dict[str, Any]:
        """What `tandem kv stats` says of the store node."""
        done = subprocess.run(
            tandem_command("kv", "stats", "--json", "--node", self.node()), capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, done.stderr
        stats: dict[str, Any] = json.loads(done.stdout)
        return stats

    def wait_connected(self, count: int) -> None:
        """All `count` workers have a session. Says what `serve` said last where they do not get one."""
        try:
            eventually(lambda: self.metric("tandem_worker_up") == count, BACK_S)
        except AssertionError as error:
            up = [line for line in self.http.get("/metrics").text.splitlines() if line.startswith("tandem_worker_up")]
            running = sorted(self.children())
            raise AssertionError("\n".join([f"{error}: {running}", *up, *self.log[-60:]])) from None

    def handovers(self) -> float:
        return self.metric("tandem_router_placements_total", reason="handover")

    def recomputes(self) -> float:
        return self.metric("tandem_router_handover_recomputes_total")

    def idle(self) -> bool:
        return self.metric("tandem_worker_running") == self.metric("tandem_worker_waiting") == 0

    def all_blocks_free(self) -> bool:
        return self.metric("tandem_worker_free_blocks") == self.metric("tandem_worker_total_blocks") > 0


def _pump(stream: Any, take: Callable[[str], object]) -> None:
    for line in stream:
        take(line.rstrip("\n"))
