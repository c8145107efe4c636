"""Two hosts, two routers that share a Redis, two tenants: the platform, its clients, and what may happen to them."""

from __future__ import annotations

import hashlib
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import yaml

from tests.e2e.cluster import Cluster, Process
from tests.e2e.serving import KINDS, Askers, ask, eventually

KEYS = {"acme": "the key of acme", "initech": "the key of initech"}
WEIGHTS = {"acme": 3.0, "initech": 1.0}
ROUTERS = ("one", "two")
BACK_S = 180.0
"""For a process to be ready again on a busy machine."""

_HANGS = """
import sys, time
from pathlib import Path
from tandem.worker import process as worker_process
from tandem.engine.engine import Engine
from tandem.runtime.cli import main

flag, step = Path(sys.argv.pop(1)), Engine._step

def hang(engine, plan):
    while flag.exists():
        worker_process.STALLED_S = 3.0
        time.sleep(0.1)
    step(engine, plan)

Engine._step = hang
sys.exit(main())
"""
"""Runs `tandem` with an engine that hangs while there is a file, and is found out sooner."""


def bearer(tenant: str) -> dict[str, str]:
    return {"authorization": f"Bearer {KEYS[tenant]}"}


class Platform(Cluster):
    """Both routers know all workers of both hosts."""

    def _add_routers(self, settings: dict[str, object], workers: dict[str, list[str]]) -> None:
        tenants = self.folder / "tenants.yaml"
        tenants.write_text(
            yaml.safe_dump(
                {
                    "tenants": [
                        {
                            "name": name,
                            "weight": WEIGHTS[name],
                            "keys": [hashlib.sha256(key.encode()).hexdigest()],
                            "admin": name == "acme",
                        }
                        for name, key in KEYS.items()
                    ]
                }
            )
        )
        own = {f"{role}_workers": addresses for role, addresses in workers.items()}
        shared = {
            "tenants_file": str(tenants),
            "redis": self.redis_url,
            "kv_directory": self.redis_url,
            "disaggregate": "auto",
            "worker_wait_s": BACK_S,
        }
        for name in ROUTERS:
            self._add_router(name, settings | own | shared, bearer("acme"))

    def _add(self, name: str, command: str, host: str, settings: dict[str, object]) -> None:
        super()._add(name, command, host, settings)
        if name == "decode-a":
            prefix = [sys.executable, "-c", _HANGS, str(self.hanging)]
            self.processes[name] = Process(name, command, self.folder, prefix, settings)

    @property
    def hanging(self) -> Path:
        """While it exists, the engine of decode-a hangs."""
        return self.folder / "hangs"

    def url(self, router: str) -> str:
        return f"http://127.0.0.1:{self[f'router-{router}'].settings['port']}"

    def begin(self) -> None:
        self.redis.start()
        self.start("node", "prefill", "decode", "router")
        for process in self.processes.values():
            process.wait_ready()
        self.wait_whole()
        self.wait_joined()

    def whole(self) -> bool:
        """All processes run, and every router knows every worker."""
        running = all(process.running for process in self.processes.values())
        return running and all(self.metric(router, "tandem_worker_up") == 4 for router in ROUTERS)

    def wait_whole(self) -> None:
        eventually(self.whole, BACK_S, "all workers connected to all routers")

    def mend(self) -> None:
        """Starts what has ended."""
        ended = [process for process in self.processes.values() if not process.running]
        for process in ended:
            process.start()
        for process in ended:
            process.wait_ready()
        self.wait_whole()

    def idle(self) -> bool:
        gauges = ("router_sequences_in_flight", "router_waiting_requests", "router_waiting_tokens")
        gauges += ("worker_running", "worker_waiting", "worker_pending_prefill_tokens")
        left = {f"{router} {name}": self.metric(router, f"tandem_{name}") for router in ROUTERS for name in gauges}
        return not any(left.values())

    def blocks_back(self) -> bool:
        free, total = (self.metric("one", f"tandem_worker_{name}_blocks") for name in ("free", "total"))
        return free == total > 0

    def signal(self, name: str, number: signal.Signals) -> None:
        os.kill(self[name].pid, number)

    def busy(self, worker: str) -> bool:
        """It computes for somebody."""
        return any(self.metric(router, "tandem_worker_running", worker=worker) > 0 for router in ROUTERS)

    def in_flight(self, router: str) -> float:
        return self.metric(router, "tandem_router_sequences_in_flight")


def questions(platform: Platform) -> list[dict[str, Any]]:
    """Greedy, drawn, penalised, scored, several choices; short and long, some with a common beginning."""
    start = platform.prompt(130)
    prompts = [start * (i % 2) + platform.prompt(20 + 31 * i) for i in range(10)]
    return [{"prompt": prompts[i], "max_tokens": 120} | KINDS[i % len(KINDS)] for i in range(10)]


class Clients(Askers):
    """Half of them streaming; those whose router goes away send again to the other."""

    wait_s = end_s = BACK_S

    def __init__(self, platform: Platform, count: int = 8) -> None:
        super().__init__(count)
        self.slowest_s = 0.0
        """Since it was last reset."""
        self.sent_again = 0
        self.cut_off = 0
        """Answers of which a part came."""
        self.leaving: set[str] = set()
        """Routers that may go away; from any other a broken connection is a fault."""
        self._platform = platform
        self._asked = questions(platform)
        with httpx.Client(base_url=platform.url("one"), headers=bearer("acme"), timeout=60, trust_env=False) as http:
            self._expected = [ask(http, "tiny", question, stream=False) for question in self._asked]

    def _run(self, number: int) -> None:
        chance = random.Random(number)
        tenant = list(KEYS)[number % 2]
        options: dict[str, Any] = {"headers": bearer(tenant), "timeout": BACK_S, "trust_env": False}
        clients = [httpx.Client(base_url=self._platform.url(router), **options) for router in ROUTERS]
        home = at = number // 2 % 2
        while not self._stopping.is_set():
            if ROUTERS[home] not in self.leaving:
                at = home
            index = chance.randrange(len(self._asked))
            question = self._asked[index]
            if chance.random() < 0.5:  # computed anew, so that prefill workers have something to do
                question = question | {"cache_salt": f"{number} {self.answered}"}
            began = time.monotonic()
            fault = ""
            while not fault:
                try:
                    got = ask(clients[at], "tiny", question, stream=number < 4)
                    if got != self._expected[index]:
                        fault = f"{question}: {got} instead of {self._expected[index]}"
                    break
                except httpx.TimeoutException as error:
                    fault = f"{ROUTERS[at]}: {error!r}"
                except httpx.TransportError as error:
                    if ROUTERS[at] not in self.leaving:
                        fault = f"{ROUTERS[at]}: {error!r}"
                    at = 1 - at
                    with self._lock:
                        self.sent_again += 1
                        self.cut_off += "incomplete" in str(error)
                except Exception as error:
                    fault = repr(error)
            with self._lock:
                self.answered += 1
                self.slowest_s = max(self.slowest_s, time.monotonic() - began)
                if fault:
                    self.wrong.append(fault)
        for client in clients:
            client.close()


class Tour:
    """What happens to the parts, one after the other, while the clients ask."""

    def __init__(self, platform: Platform, clients: Clients) -> None:
        self._platform = platform
        self._clients = clients

    def kill_worker(self, name: str) -> None:
        eventually(lambda: self._platform.busy(name), BACK_S, f"{name} busy")
        self._platform[name].kill()

    def drain_worker(self, name: str) -> None:
        eventually(lambda: self._platform.busy(name), BACK_S, f"{name} busy")
        self._platform[name].kill(signal.SIGTERM)

    def freeze_worker(self, name: str) -> None:
        """Until the routers have noticed, and a little longer."""
        eventually(lambda: self._platform.busy(name), BACK_S, f"{name} busy")
        self._platform.signal(name, signal.SIGSTOP)
        try:
            eventually(lambda: not self._platform.whole(), what=f"{name} given up")
            self._clients.wait(8)
        finally:
            self._platform.signal(name, signal.SIGCONT)

    def hang_worker(self, name: str) -> None:
        """Its engine, while its event loop goes on."""
        eventually(lambda: self._platform.busy(name), BACK_S, f"{name} busy")
        self._platform.hanging.touch()
        eventually(lambda: not self._platform[name].running, BACK_S, f"{name} ended")
        self._platform.hanging.unlink()
        assert self._platform[name].logged("the engine has not moved")

    def kill_router(self, name: str) -> None:
        self._clients.leaving.add(name)
        eventually(lambda: self._platform.in_flight(name) > 0, BACK_S, f"router {name} busy")
        self._platform[f"router-{name}"].kill()

    def drain_router(self, name: str) -> None:
        """What has begun is finished: whoever has to send again has not been let in."""
        self._clients.leaving.add(name)
        eventually(lambda: self._platform.in_flight(name) > 0, BACK_S, f"router {name} busy")
        cut_off = self._clients.cut_off
        self._platform[f"router-{name}"].kill(signal.SIGTERM)
        self._clients.wait(4)
        assert self._clients.cut_off == cut_off

    def kill_redis(self, name: str) -> None:
        self._platform.redis.terminate()
        self._clients.wait(8)
        self._platform.redis.start()  # empty

    def kill_node(self, name: str) -> None:
        self._platform[name].kill()

    def happens(self, what: Callable[[str], None], name: str, answers: int = 12) -> None:
        """And goes on being so for a number of answers."""
        clients = self._clients
        clients.slowest_s, before, sent, began = 0.0, clients.answered, clients.sent_again, time.monotonic()
        what(name)
        clients.wait(answers)
        print(
            f"{what.__name__} {name}: {clients.answered - before} answers in {time.monotonic() - began:.1f} s, the "
            f"slowest {clients.slowest_s:.1f} s, {clients.sent_again - sent} sent again"
        )

    def mend(self) -> None:
        self._platform.mend()
        self._clients.leaving.clear()
