"""Two hosts, two routers that share a Redis, two tenants: whatever is killed, frozen or drained under load, every
client gets its whole answer, the one it gets when nothing happens.

A client whose router went away asks the other one again. Nobody else sees an error: not for workers, Redis, the store.
"""

from __future__ import annotations

import json
import random
import socket
import struct
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from tests.e2e.live import KEYS, Clients, Platform, Tour, bearer, questions
from tests.e2e.serving import ask, eventually


@pytest.fixture(scope="module")
def platform(tiny: Path) -> Iterator[Platform]:
    with Platform(tiny, kv_host_bytes=16 << 20, kv_disk_bytes=64 << 20) as platform:
        platform.begin()
        yield platform


@pytest.mark.timeout(900)
def test_whatever_dies_under_load_every_client_gets_its_answer(platform: Platform) -> None:
    with Clients(platform, 6) as clients:
        clients.wait(8)
        tour = Tour(platform, clients)
        tour.happens(tour.kill_worker, "decode-a", 6)
        tour.happens(tour.kill_router, "one", 6)
        tour.happens(tour.kill_redis, "redis", 6)
        tour.mend()
        tour.happens(tour.drain_worker, "decode-b", 6)
    eventually(platform.idle, what="nothing in flight")


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_everything_dies_in_turn(platform: Platform) -> None:
    platform.mend()
    with Clients(platform) as clients:
        clients.wait(16)
        tour = Tour(platform, clients)
        for host, router in (("a", "one"), ("b", "two")):
            for what, name in (
                (tour.kill_worker, f"prefill-{host}"),
                (tour.kill_worker, f"decode-{host}"),
                (tour.kill_router, router),
                (tour.kill_redis, "redis"),
                (tour.kill_node, f"node-{host}"),
                (tour.drain_worker, f"decode-{host}"),
                (tour.drain_worker, f"prefill-{host}"),
                (tour.drain_router, router),
                (tour.freeze_worker, f"decode-{host}"),
                (tour.freeze_worker, f"prefill-{host}"),
            ):
                tour.happens(what, name)
                tour.mend()
        tour.happens(tour.hang_worker, "decode-a")
        tour.mend()
    eventually(platform.idle, what="nothing in flight")
    eventually(platform.blocks_back, what="all blocks free")


def leave(sock: socket.socket, *, rudely: bool) -> None:
    """Rudely: with a reset."""
    if rudely:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


def test_rubbish_leaves_nothing_behind(platform: Platform) -> None:
    """Bodies that are cut, bytes that are no request, clients that leave at any time, and some that hardly read."""
    address = ("127.0.0.1", int(str(platform["router-one"].settings["port"])))
    router, log = psutil.Process(platform["router-one"].pid), platform["router-one"].log
    question = questions(platform)[2]
    body = json.dumps(question | {"model": "tiny", "stream": True, "n": 4, "logprobs": 5}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {KEYS['acme']}\r\n"
    whole = f"{head}content-length: {len(body)}\r\n\r\n".encode() + body
    chance = random.Random(11)

    def connect(content: bytes, **options: int) -> socket.socket:
        sock = socket.socket()
        for name, value in options.items():
            sock.setsockopt(socket.SOL_SOCKET, getattr(socket, name), value)
        sock.settimeout(30)
        sock.connect(address)
        sock.sendall(content)
        return sock

    def storm(count: int) -> None:
        clients = [connect(whole if i % 4 else whole[: chance.randrange(len(whole))]) for i in range(count)]
        for i, client in enumerate(clients):
            if i % 8 == 1:
                client.recv(1000)
            leave(client, rudely=i % 2 == 0)

    eventually(platform.idle, what="nothing in flight before")
    with httpx.Client(base_url=platform.url("one"), headers=bearer("acme"), timeout=60, trust_env=False) as http:
        expected = ask(http, "tiny", question, stream=False)
        storm(20)  # what is made once is made
        eventually(platform.idle, 60, "nothing in flight")
        descriptors, memory, lines = router.num_fds(), router.memory_info().rss, len(log)
        slow = [connect(whole, SO_RCVBUF=4096) for _ in range(16)]
        for cut in range(0, len(whole), len(whole) // 20):
            leave(connect(whole[:cut]), rudely=cut % 2 == 0)
        for garbage in (
            chance.randbytes(2000),
            b"GET / HTTP/9.9\r\n\r\n",
            f"{head}content-length: many\r\n\r\n".encode(),
            f"{head}transfer-encoding: chunked\r\n\r\nzz\r\n".encode(),
            f"{head}content-length: 4\r\n\r\n{{}}}}}}".encode() + chance.randbytes(500),
        ):
            client = connect(garbage)
            client.recv(1000)
            leave(client, rudely=False)
        storm(200)
        assert [client.recv(20) for client in slow] == [b"HTTP/1.1 200 OK\r\ndat"] * len(slow)
        assert ask(http, "tiny", question, stream=True) == expected
        for client in slow:
            leave(client, rudely=True)
        eventually(platform.idle, 60, "nothing in flight afterwards")
        eventually(platform.blocks_back, what="all blocks free")
        eventually(lambda: router.num_fds() <= descriptors + 2, what="connections closed")
        assert router.memory_info().rss < memory + (48 << 20)
    assert not [line for line in log[lines:] if "lost worker" in line or "Traceback" in line]
