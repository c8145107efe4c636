"""`tandem kvstore` and `tandem kv` as a user runs them: put, get, restart, peers, directory, kill, drain."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tandem.common.errors import ConfigError
from tandem.kvstore.dataplane.client import RemoteHomeNode
from tandem.kvstore.directory import EmbeddedDirectory
from tandem.kvstore.interfaces import Located, Refusal, TierName
from tandem.kvstore.process import admin
from tandem.kvstore.process.open import open_node
from tandem.kvstore.settings import StoreSettings
from tandem.runtime import cli, running
from tests.kvstore.chunks import NUM_LAYERS, info, is_sound, key, put
from tests.kvstore.homes import connects
from tests.ports import free_port

pytestmark = pytest.mark.processes

DEADLINE_S = 60.0


class Node:
    """A child process, and its lines on stderr."""

    metrics_port = 0

    def __init__(self, folder: Path, *arguments: str) -> None:
        self.unix_path = str(folder / "kv.sock")
        self.process = subprocess.Popen(
            [
                *(sys.executable, "-m", "tandem.runtime.cli", "kvstore", "--kv-store-socket", self.unix_path),
                *("--listen", f"unix:{folder}/control.sock", "--kv-host-bytes", str(32 << 20), *arguments),
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.errors: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        assert self.process.stdout is not None
        line = self.process.stdout.readline().split()
        assert line[:1] == ["ready"], "".join(self.errors)
        self.node_id, self.address = line[1:]

    def _read(self) -> None:
        assert self.process.stderr is not None
        self.errors.extend(self.process.stderr)

    def stop(self, number: int = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        code = self.process.wait(DEADLINE_S)
        self._reader.join(DEADLINE_S)
        for pipe in (self.process.stdout, self.process.stderr):
            assert pipe is not None
            pipe.close()
        return code


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Node]]:
    nodes: list[Node] = []

    def start(name: str, *arguments: str) -> Node:
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        nodes.append(Node(folder, "--node-id", name, *arguments))
        return nodes[-1]

    yield start
    for node in nodes:
        if node.process.poll() is None:
            node.stop(signal.SIGKILL)


@pytest.fixture
def connect() -> Iterator[Callable[[Node], RemoteHomeNode]]:
    homes: list[RemoteHomeNode] = []

    def connect(node: Node) -> RemoteHomeNode:
        homes.append(RemoteHomeNode(node.unix_path, "worker"))
        assert connects(homes[-1], DEADLINE_S)
        return homes[-1]

    yield connect
    for home in homes:
        home.close()


def located(home: RemoteHomeNode, *numbers: int) -> list[Located]:
    """Waits until the directory has told of all of them."""
    deadline = time.monotonic() + DEADLINE_S
    while len(found := home.locate([key(number) for number in numbers])) < len(numbers):
        assert time.monotonic() < deadline, f"only {len(found)} of {len(numbers)} were located"
        time.sleep(0.01)
    return found


def assert_fetched(home: RemoteHomeNode, *numbers: int, tier: TierName) -> None:
    fetch = home.fetch(located(home, *numbers))
    try:
        assert {source.tier for source in fetch.sources} == {tier}
        assert fetch.wait(NUM_LAYERS, DEADLINE_S)
        deadline = time.monotonic() + DEADLINE_S
        while fetch.intact() < len(numbers):  # what follows the last layer may still be on its way
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert all(is_sound(fetch, index, number) for index, number in enumerate(numbers))
    finally:
        fetch.close()


def kv(node: Node, capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, dict[str, object]]:
    capsys.readouterr()
    code = admin.main([*arguments, "--node", node.address, "--json"])
    return code, json.loads(capsys.readouterr().out)


def test_two_workers_share_a_node_and_operators_can_look_into_it(
    start: Callable[..., Node], connect: Callable[[Node], RemoteHomeNode], capsys: pytest.CaptureFixture[str]
) -> None:
    node = start("n0")
    writer, reader = connect(node), connect(node)
    for number in range(4):
        assert put(writer, number, owner="acme" if number == 3 else "default")
    assert writer.begin_put(key(0), info(0)) is Refusal.EXISTS
    assert_fetched(reader, 0, 1, 2, 3, tier=TierName.HOST)

    code, stats = kv(node, capsys, "stats")
    assert code == 0
    assert stats["node_id"] == "n0"
    assert stats["known_nodes"] == ["n0"]
    tiers = stats["tiers"]
    assert isinstance(tiers, list)
    assert tiers[0]["tier"] == "host"
    assert (tiers[0]["objects"], tiers[0]["hits"]) == (4, 4)
    assert stats["refused_puts"] == {"exists": 1}

    _, found = kv(node, capsys, "lookup", key(3).hex(), key(9).hex())
    first, second = found["objects"]  # type: ignore[misc]
    assert (first["key"], first["tiers"], first["owner"]) == (key(3).hex(), ["host"], "acme")
    assert second["tiers"] == []

    assert kv(node, capsys, "pin", key(0).hex(), "--hard", "--owner", "me") == (0, {"pinned": True})
    assert kv(node, capsys, "unpin", key(0).hex(), "--owner", "me") == (0, {"unpinned": True})
    assert kv(node, capsys, "unpin", key(0).hex(), "--owner", "me") == (1, {"unpinned": False})
    assert kv(node, capsys, "pin", key(9).hex()) == (1, {"pinned": False})
    assert kv(node, capsys, "move", key(0).hex(), "disk") == (1, {"moved": False})
    assert kv(node, capsys, "drain") == (0, {"flushed": True})
    code, report = kv(node, capsys, "check")
    assert (code, report["integrity_error"], report["checked"], report["bad_keys"]) == (0, "", 4, [])
    assert kv(node, capsys, "clear", "--owner", "acme") == (0, {"objects": 1})
    assert kv(node, capsys, "clear", "--all") == (0, {"objects": 3})
    assert reader.locate([key(0)]) == []


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    """A node of several tests: starting one takes a second or two."""
    port = free_port()
    node = Node(tmp_path_factory.mktemp("shared"), "--node-id", "shared", "--metrics-port", str(port))
    node.metrics_port = port
    yield node
    if node.process.poll() is None:
        assert node.stop() == 0
        assert not os.path.exists(node.unix_path)


def test_people_get_tables(shared: Node, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["stats"], ["lookup", key(1).hex()], ["check"]):
        assert admin.main([*arguments, "--node", shared.address]) == 0
    out = capsys.readouterr().out
    assert "host" in out
    assert f"{key(1).hex()}  nowhere" in out
    assert "books: balance" in out


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["clear"], "--all"),
        (["lookup", "xyz"], "64 hex digits"),
        (["frobnicate"], "frobnicate"),
        (["stats", "--nodes", "x"], "--nodes"),
    ],
)
def test_a_wrong_command_line_is_explained(
    arguments: list[str],
    complaint: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(running, "scratch_roots", lambda: [tmp_path])  # not what else runs on this machine
    assert cli.main(["kv", *arguments]) == 2
    assert complaint in capsys.readouterr().err


def test_a_node_that_is_not_there_is_named(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert admin.main(["stats", "--node", f"unix:{tmp_path}/none.sock"]) == 1
    assert "none.sock" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("kv_eviction", "magic"),
        ("kv_disk_codec", "zip"),
        ("secret_file", "/nonexistent"),
        ("kv_directory", "http://x"),
        ("kv_encryption_key_file", "/dev/null"),
        ("kv_disk", "/dev/null/x"),
        ("kv_remote", "gopher://x"),
        ("kv_peer_listen", "192.0.2.1:9301"),
    ],
)
def test_what_cannot_be_opened_is_named_and_leaves_nothing(setting: str, value: str, tmp_path: Path) -> None:
    before = set(threading.enumerate())
    settings = replace(StoreSettings(kv_host_bytes=1 << 20), **{setting: value})  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=setting):
        open_node(settings, "n", 1, unix_path=str(tmp_path / "kv.sock"), directory=_directory(settings))
    assert not {thread.name for thread in set(threading.enumerate()) - before if thread.name.startswith("kv-")}
    assert list(tmp_path.iterdir()) == []


def _directory(settings: StoreSettings) -> EmbeddedDirectory | None:
    return None if settings.kv_directory else EmbeddedDirectory()


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--kv-host-bytes", "0"], "--kv-host-bytes"),
        (["--kv-peer-listen", "0.0.0.0:1"], "--kv-peer-listen"),
        (["--kv-copies", "0"], "--kv-copies"),
        (["--kv-quotas", "*=2"], "kv-quotas: *"),
        (["--listen", "9300"], "listen"),
    ],
)
def test_a_wrong_setting_is_named(arguments: list[str], complaint: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["kvstore", *arguments]) == 2
    assert complaint in capsys.readouterr().err


def test_nodes_read_from_each_other_and_a_third_worker_sees_both(
    start: Callable[..., Node], connect: Callable[[Node], RemoteHomeNode], capsys: pytest.CaptureFixture[str]
) -> None:
    first = start("n0")
    second = start("n1", "--kv-directory", first.address)
    writer, reader = connect(first), connect(second)
    for number in range(3):
        assert put(writer, number)
    assert_fetched(reader, 0, 1, 2, tier=TierName.PEER)
    assert_fetched(reader, 0, 1, 2, tier=TierName.HOST)  # they stay where they were fetched
    deadline = time.monotonic() + DEADLINE_S
    while kv(second, capsys, "stats")[1]["known_nodes"] != ["n0", "n1"]:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    tiers = {tier["tier"]: tier for tier in kv(second, capsys, "stats")[1]["tiers"]}  # type: ignore[attr-defined]
    assert (tiers["peer"]["hits"], tiers["host"]["hits"]) == (3, 3)
    _, found = kv(first, capsys, "lookup", key(0).hex())
    assert found["objects"][0]["elsewhere"][0]["node_id"] == "n1"  # type: ignore[index]


def test_a_killed_node_is_missed_and_comes_back_empty(
    start: Callable[..., Node], connect: Callable[[Node], RemoteHomeNode]
) -> None:
    node = start("n0")
    home = connect(node)
    assert put(home, 0)
    fetch = home.fetch(located(home, 0))
    node.stop(signal.SIGKILL)
    deadline = time.monotonic() + DEADLINE_S
    while home.connected:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    assert not fetch.wait(1, 0)
    fetch.close()
    assert home.begin_put(key(1), info(1)) is Refusal.CLOSED
    start("n0")
    assert connects(home, DEADLINE_S)
    assert home.locate([key(0)]) == []
    assert put(home, 0)


def test_workers_that_are_killed_while_they_write_leave_no_hold(
    shared: Node, capsys: pytest.CaptureFixture[str]
) -> None:
    script = (
        "import sys, time\n"
        "from tandem.kvstore.dataplane.client import RemoteHomeNode\n"
        "from tandem.kvstore.interfaces import ObjectInfo\n"
        f"home = RemoteHomeNode({shared.unix_path!r}, 'victim')\n"
        "while not home.connected:\n"
        "    time.sleep(0.01)\n"
        "home.begin_put(bytes(32), ObjectInfo(size=1 << 20, num_tokens=1))\n"
        "print('writing', flush=True)\n"
        "time.sleep(60)\n"
    )
    victim = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert victim.stdout is not None
    assert victim.stdout.readline() == "writing\n"
    victim.kill()
    victim.wait()
    victim.stdout.close()
    deadline = time.monotonic() + DEADLINE_S
    while (values := kv(shared, capsys, "stats")[1]["values"])["puts_in_flight"]:  # type: ignore[index]
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert (values["zombies"], values["leases"]) == (0, 0)  # type: ignore[index]


def test_a_drained_node_has_written_everything_to_disk(
    start: Callable[..., Node], connect: Callable[[Node], RemoteHomeNode], tmp_path: Path
) -> None:
    disk = ["--kv-disk", str(tmp_path / "disk"), "--kv-disk-bytes", str(64 << 20)]
    node = start("n0", *disk)
    home = connect(node)
    for number in range(8):
        assert put(home, number)
    located(home, *range(8))
    assert node.stop() == 0, "".join(node.errors)
    start("n0", *disk)
    assert connects(home, DEADLINE_S)
    assert_fetched(home, *range(8), tier=TierName.DISK)
    assert_fetched(home, *range(8), tier=TierName.HOST)


def test_health_and_metrics_are_served(shared: Node, connect: Callable[[Node], RemoteHomeNode]) -> None:
    home = connect(shared)
    assert put(home, 0)
    assert_fetched(home, 0, tier=TierName.HOST)
    with grpc.insecure_channel(shared.address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        answer = stub.Check(health_pb2.HealthCheckRequest(service="tandem.kvnode.v1.KvNode"), timeout=DEADLINE_S)
    assert answer.status == health_pb2.HealthCheckResponse.SERVING
    with urllib.request.urlopen(f"http://127.0.0.1:{shared.metrics_port}/metrics", timeout=DEADLINE_S) as response:
        text = response.read().decode()
    assert 'tandem_kvstore_hits_total{tier="host"} 1.0' in text
    assert 'tandem_kvstore_hits_total{tier="peer"} 0.0' in text
    assert 'tandem_kvstore_tier_objects{tier="host"} 1.0' in text
    assert "tandem_kvstore_data_plane_connections 1.0" in text


def test_a_store_node_loads_no_torch_and_stays_small(shared: Node) -> None:
    assert "torch" not in Path(f"/proc/{shared.process.pid}/maps").read_text()
    status = Path(f"/proc/{shared.process.pid}/status").read_text()
    resident_kib = int(next(line for line in status.splitlines() if line.startswith("VmRSS")).split()[1])
    assert resident_kib < 200 << 10  # measured: 68 MiB
