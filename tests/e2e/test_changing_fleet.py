"""A router whose workers come and go under load, as processes: nobody hears of it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from tests.e2e.cluster import Process
from tests.e2e.serving import KINDS, Askers, ask, environment, eventually, tandem_command
from tests.ports import free_port

QUESTIONS: list[dict[str, Any]] = [
    {"prompt": [7 + number, *range(20, 60)], "max_tokens": 24, **kind} for number, kind in enumerate(KINDS)
]


class Fleet:
    """A router that watches a file, one prefill worker and two decode workers, of which none is listed yet."""

    def __init__(self, model: Path, folder: Path) -> None:
        self.folder = folder
        self.port = free_port()
        shared = {"model": str(model), "served_model_name": "tiny"}
        self.processes: dict[str, Process] = {}
        for name in ("prefill-0", "decode-0", "decode-1"):
            settings = shared | {"dtype": "float32", "listen": self.address(name), "worker_id": name}
            self._add(name, name.partition("-")[0], settings | {"kv_cache_bytes": 16 << 20, "drain_grace_s": 60.0})
        self.list()
        routing = {"port": self.port, "workers_file": str(self.file), "disaggregate": "always", "worker_wait_s": 180.0}
        self._add("router", "router", shared | routing)
        self.http = httpx.Client(base_url=f"http://127.0.0.1:{self.port}", timeout=180.0, trust_env=False)

    @property
    def file(self) -> Path:
        return self.folder / "workers.yaml"

    def address(self, name: str) -> str:
        return f"unix:{self.folder}/{name}.sock"

    def list(self, *names: str) -> None:
        """Writes these, and no others, into the file."""
        listed = {
            role: [self.address(name) for name in names if name.startswith(role)] for role in ("decode", "prefill")
        }
        new = self.folder / "workers.new"
        new.write_text(yaml.safe_dump(listed))
        os.replace(new, self.file)

    def workers(self) -> set[str]:
        """Those that have a session with the router."""
        return set(re.findall(r'^tandem_worker_up\{.*worker="([^"]+)".*\} 1\.0$', self.metrics(), re.MULTILINE))

    def metrics(self) -> str:
        return self.http.get("/metrics").text

    def answered(self, name: str) -> float:
        """Requests that ended on it; 0 where the router does not know it."""
        pattern = rf'^tandem_worker_requests_total\{{process="{name}".*\}} (.*)$'
        return sum(map(float, re.findall(pattern, self.metrics(), re.MULTILINE)))

    def _add(self, name: str, command: str, settings: dict[str, object]) -> None:
        self.processes[name] = Process(name, command, self.folder, tandem_command(), settings)

    def close(self) -> None:
        self.http.close()
        for process in self.processes.values():
            if process.running:
                process.kill()


@pytest.fixture
def fleet(tiny: Path) -> Iterator[Fleet]:
    with tempfile.TemporaryDirectory(prefix="tandem-e2e-") as folder:
        fleet = Fleet(tiny, Path(folder))
        try:
            for process in fleet.processes.values():
                process.start()
            for name in ("prefill-0", "decode-0", "decode-1"):
                fleet.processes[name].wait_ready()
            eventually(lambda: answers(fleet), what="the router listens")
            yield fleet
        finally:
            fleet.close()


def answers(fleet: Fleet) -> bool:
    try:
        return fleet.http.get("/healthz").status_code == 200
    except httpx.TransportError:
        return False


class Clients(Askers):
    """Ask one of the questions after the other, and compare with the answer that each had first."""

    def __init__(self, fleet: Fleet, count: int, right: list[list[tuple[str, list[int], str]]]) -> None:
        super().__init__(count)
        self._url, self._right = str(fleet.http.base_url), right

    def _run(self, number: int) -> None:
        with httpx.Client(base_url=self._url, timeout=180.0, trust_env=False) as http:
            turn = number
            while not self._stopping.is_set():
                turn += 1
                question, right = QUESTIONS[turn % len(QUESTIONS)], self._right[turn % len(QUESTIONS)]
                try:
                    answer = ask(http, "tiny", question, stream=turn % 2 == 0)
                except (AssertionError, httpx.HTTPError) as error:
                    self.wrong.append(repr(error))
                    return
                with self._lock:
                    self.answered += 1
                    if answer != right:
                        self.wrong.append(f"{question}: {answer} instead of {right}")


@pytest.mark.timeout(900)
def test_workers_come_and_go_under_load_and_no_request_fails(fleet: Fleet) -> None:
    assert fleet.workers() == set()
    fleet.list("decode-0")
    right = [ask(fleet.http, "tiny", question, stream=False) for question in QUESTIONS]
    with Clients(fleet, 4, right) as clients:
        clients.wait(4)
        fleet.list("decode-0", "decode-1", "prefill-0")
        eventually(lambda: fleet.workers() == {"decode-0", "decode-1", "prefill-0"})
        eventually(lambda: fleet.answered("decode-1") > 0, 180.0, "the newcomer is given requests")
        before = fleet.answered("decode-0")
        fleet.list("decode-1", "prefill-0")
        eventually(lambda: fleet.workers() == {"decode-1", "prefill-0"}, 180.0)
        assert "decode-0" not in fleet.metrics(), "nothing of it stays"
        clients.wait(4)
        fleet.list("decode-0", "decode-1", "prefill-0")
        eventually(lambda: fleet.answered("decode-0") > before, 180.0, "it is used again")
        drained = subprocess.run(
            tandem_command("drain", fleet.address("decode-1"), "--grace-s", "60"),
            capture_output=True,
            text=True,
            timeout=180,
            env=environment(),
            check=False,
        )
        assert (drained.returncode, drained.stderr) == (0, "")
        assert "decode-1 is empty: " in drained.stdout
        fleet.processes["decode-1"].kill(signal.SIGTERM)
        fleet.list("decode-0")
        eventually(lambda: fleet.workers() == {"decode-0"}, 180.0)
        clients.wait(4)
    assert clients.answered > 0
