"""Whatever breaks in or around the KV store costs time: no request fails, no token is wrong, nothing grows without
bound, and afterwards everything is as before.

Real processes on two hosts; Valkey holds the directory. The pools and the nodes' memory are small, so that most answers
need the store. Each answer is compared with the one given without any cache.
"""

from __future__ import annotations

import contextlib
import os
import random
import resource
import signal
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from tests.e2e.cluster import CHUNK, Cluster, Load, Proxy, Questions, costly_model, flipped
from tests.e2e.serving import eventually

HOST_BYTES = 8 << 20
DISK_BYTES = 64 << 20
POOL_BYTES = 3 << 20


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Started in the wrong order: those who need the others first."""
    model = costly_model(tmp_path_factory.mktemp("kv"))
    with Cluster(model, pool_bytes=POOL_BYTES, kv_host_bytes=HOST_BYTES, kv_disk_bytes=DISK_BYTES) as cluster:
        cluster.start("router", "decode", "prefill")
        cluster.wait_ready("router", "decode", "prefill")
        early = tuple(cluster.prompt(300))
        answer = cluster.ask("a", early).tokens
        cluster.start("node")
        cluster.wait_ready("node")
        assert cluster.ask("b", early).tokens == answer
        cluster.redis.start()
        cluster.wait_joined()
        cluster.crosses("a", "b")
        cluster.crosses("b", "a")
        yield cluster


@pytest.fixture(scope="module")
def questions(cluster: Cluster) -> Questions:
    """Prompts with shared beginnings, and their answers; more than a worker's pool holds."""
    shared = [cluster.prompt(150) for _ in range(4)]
    prompts = [(*start, *cluster.prompt(130)) for start in shared for _ in range(10)]
    return dict(zip(prompts, cluster.cold(prompts), strict=True))


@pytest.fixture(autouse=True)
def _sound_afterwards(cluster: Cluster) -> Iterator[None]:
    """The books balance, no checksum is wrong, nothing is held for nobody, and each host loads the other's text."""
    yield
    cluster.wait_joined()
    for host in ("a", "b"):
        cluster.crosses(host, "ba"["ab".index(host)])
    eventually(lambda: held(cluster, "a") == held(cluster, "b") == {}, what="nothing held")
    cluster.check()


def held(cluster: Cluster, host: str) -> dict[str, float]:
    values = cluster.stats(host).values
    names = ("leases", "puts_in_flight", "loads_in_flight", "fetches_open", "zombies", "detached", "write_back_queued")
    return {name: values[name] for name in names if values[name]}


def rss(cluster: Cluster, name: str) -> int:
    return int(psutil.Process(cluster[name].pid).memory_info().rss)


# Processes that die


def test_nodes_and_redis_are_killed_under_load(cluster: Cluster, questions: Questions) -> None:
    with Load(cluster, questions) as load:
        load.wait(30)
        for name in ("node-b", "node-a"):
            cluster[name].kill()
            load.wait(20)
            cluster[name].start()
            load.wait(10)
            cluster[name].wait_ready()
        load.wait(20)
        cluster.redis.terminate()
        load.wait(30)
        cluster.redis.start()  # empty
        load.wait(20)
        eventually(lambda: {"host", "peer"} <= load.tiers.keys(), what="text from the other host's node")


@pytest.mark.slow
def test_everything_is_killed_and_stopped_at_random(cluster: Cluster, questions: Questions) -> None:
    chance = random.Random(7)
    with Load(cluster, questions) as load:
        for _ in range(12):
            name = chance.choice(("node-a", "node-b", "redis"))
            if name == "redis":
                cluster.redis.terminate()
                load.wait(chance.randrange(60))
                cluster.redis.start()
            elif chance.random() < 0.5:
                os.kill(cluster[name].pid, signal.SIGSTOP)
                load.wait(chance.randrange(40))
                os.kill(cluster[name].pid, signal.SIGCONT)
            else:
                cluster[name].restart()
            load.wait(chance.randrange(60))


# Disks that lie


def damage(folder: Path, chance: random.Random, every_bytes: int = 15_000) -> int:
    """Flips bits in 64 bytes of every few kilobytes of each file, and cuts one file short. How many places."""
    places = 0
    files = [path for path in sorted(folder.glob("*")) if path.name != "lock" and path.stat().st_size]
    for path in files:
        size = path.stat().st_size
        with path.open("r+b") as file:
            for start in range(0, size, every_bytes):
                place = start + chance.randrange(min(every_bytes, size - start))
                file.seek(place)
                content = file.read(min(64, size - place))
                file.seek(place)
                file.write(flipped(content, chance))
                places += 1
    if len(files) > 1:
        os.truncate(files[-1], chance.randrange(files[-1].stat().st_size))
    return places


def find_damage(cluster: Cluster) -> None:
    """The checks find what nobody has asked for yet. A damaged object can be in another host's memory, too: who uses an
    object verifies it, not who passes it on."""
    for host in ("a", "b"):
        with contextlib.suppress(AssertionError):
            cluster.check(host)


def test_bits_flip_and_files_are_cut_while_the_node_is_down(cluster: Cluster, questions: Questions) -> None:
    with Load(cluster, questions) as load:
        load.wait(60)
    cluster.flush("a")
    cluster["node-a"].kill()
    assert damage(cluster.disk("a"), random.Random(1)) > 20
    cluster["node-a"].start()
    cluster["node-a"].wait_ready()
    with Load(cluster, questions) as load:
        load.wait(120)
        eventually(lambda: cluster.stats("a").values["quarantined"] > 0, what="objects in quarantine")
    find_damage(cluster)


@pytest.mark.slow
def test_bits_flip_while_the_node_runs(cluster: Cluster, questions: Questions) -> None:
    chance = random.Random(2)
    with Load(cluster, questions) as load:
        for host in "abab":
            load.wait(40)
            damage(cluster.disk(host), chance)
            cluster[f"node-{host}"].kill()
            damage(cluster.disk(host), chance, 300_000)
            cluster[f"node-{host}"].start()
            cluster[f"node-{host}"].wait_ready()
    find_damage(cluster)


# Places that are full


@pytest.fixture(params=["file size", "file system"])
def full_disk(request: pytest.FixtureRequest, cluster: Cluster, tmp_path: Path) -> Iterator[Callable[[], int]]:
    """Host a's node with a disk of 2 MiB that is said to have 1 GiB; returns what tells the bytes it takes."""
    node = cluster["node-a"]
    before = {name: node.settings[name] for name in ("kv_disk", "kv_disk_bytes")}
    with contextlib.ExitStack() as stack:
        if request.param == "file system":
            command = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(tmp_path)]
            if os.geteuid() or subprocess.run(command, capture_output=True, timeout=10).returncode:
                pytest.skip("a file system cannot be mounted here")
            stack.callback(subprocess.run, ["umount", "-l", str(tmp_path)], check=True, timeout=10)
        node.restart(kv_disk=str(tmp_path / "disk"), kv_disk_bytes=1 << 30)
        if request.param == "file size":
            resource.prlimit(node.pid, resource.RLIMIT_FSIZE, (2 << 20, 2 << 20))
        cluster.wait_joined()
        yield lambda: sum(path.stat().st_blocks * 512 for path in (tmp_path / "disk").glob("*"))
        node.restart(**before)


@pytest.mark.slow
def test_a_full_disk_stops_nobody(cluster: Cluster, questions: Questions, full_disk: Callable[[], int]) -> None:
    def ask(_: int) -> int:
        return len(cluster.ask("a", cluster.prompt(200), 1).tokens)

    with Load(cluster, questions) as load:
        load.wait(40)
    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(ask, range(50))) == 50
    with Load(cluster, questions) as load:
        load.wait(40)
    cluster.flush("a")
    host, disk = cluster.stats("a").tiers[:2]
    assert disk.writes > 0
    assert disk.writes_dropped + disk.evictions > 0
    assert disk.used_bytes <= full_disk()
    assert host.used_bytes <= HOST_BYTES
    assert host.objects > 0


@pytest.mark.parametrize("count", [150, pytest.param(1500, marks=pytest.mark.slow)])
def test_different_prompts_do_not_make_a_node_grow(cluster: Cluster, count: int) -> None:
    def ask(number: int) -> int:
        return len(cluster.ask("a", cluster.prompt(CHUNK + 2), 1).tokens)

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(ask, range(30))) == 30
        before = rss(cluster, "node-a")
        assert sum(pool.map(ask, range(count))) == count
    cluster.flush("a")
    host, disk = cluster.stats("a").tiers[:2]
    assert host.used_bytes <= HOST_BYTES
    assert host.evictions > count // 3
    assert disk.used_bytes <= DISK_BYTES
    assert rss(cluster, "node-a") <= before + HOST_BYTES
    assert sum(path.stat().st_size for path in cluster.disk("a").iterdir()) <= DISK_BYTES


# Networks that lie


@pytest.fixture
def proxy(cluster: Cluster) -> Iterator[Proxy]:
    """Between host b and node a."""
    with Proxy(cluster.store_address) as proxy:
        cluster.reroute(proxy.port)
        cluster["node-b"].restart()
        cluster.wait_joined()
        cluster.crosses("a", "b")
        assert proxy.passed_bytes > 0
        yield proxy
        cluster.reroute(None)
        proxy.set_mode("pass")


def ask_through(cluster: Cluster, proxy: Proxy, mode: str, count: int) -> None:
    """Until the proxy has spoiled `count` answers."""
    proxy.set_mode(mode)
    goal = proxy.num_faults + count

    def spoiled() -> bool:
        prompt = cluster.prompt(300)
        assert cluster.ask("a", prompt).tokens == cluster.ask("b", prompt).tokens
        return proxy.num_faults >= goal

    eventually(spoiled, what=f"{count} answers spoiled by {mode}")
    proxy.set_mode("pass")
    find_damage(cluster)
    cluster.crosses("a", "b")


def test_a_network_that_lies_changes_no_token(cluster: Cluster, proxy: Proxy) -> None:
    ask_through(cluster, proxy, "any", 4)


@pytest.mark.slow
@pytest.mark.parametrize("mode", Proxy.MODES[1:-1])
def test_each_lie_changes_no_token(cluster: Cluster, proxy: Proxy, mode: str) -> None:
    ask_through(cluster, proxy, mode, 4)


@pytest.mark.slow
def test_a_network_that_lies_under_load(cluster: Cluster, proxy: Proxy, questions: Questions) -> None:
    chance = random.Random(3)
    with Load(cluster, questions) as load:
        for _ in range(12):
            proxy.set_mode(chance.choice(Proxy.MODES))
            load.wait(30)
        proxy.set_mode("pass")
    find_damage(cluster)
