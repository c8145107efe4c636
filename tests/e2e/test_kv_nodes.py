"""Text that one host has computed is loaded on another, through every tier, and only by those who know the secret.

Real processes: a store node, a prefill and a decode worker on each of two hosts, with Valkey as directory and remote
tier. Greedy answers are compared with the ones given before anything was cached.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from functools import partial

import pytest

from tests.e2e.cluster import CHUNK, HOSTS, Answer, Cluster, costly_model
from tests.e2e.serving import eventually

LENGTH = 300
STORED = LENGTH // CHUNK * CHUNK


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with Cluster(
        costly_model(tmp_path_factory.mktemp("kv")), remote=True, kv_host_bytes=32 << 20, kv_disk_bytes=64 << 20
    ) as cluster:
        cluster.redis.start()
        cluster.start("node", "prefill", "decode", "router")
        cluster.wait_ready("node", "prefill", "decode", "router")
        cluster.wait_joined()
        yield cluster


def kill_nodes(cluster: Cluster, *, wipe: bool = False, also: tuple[str, ...] = ()) -> None:
    """And start them again, with their disks or with empty ones."""
    for process in cluster.named("node", *also):
        process.kill()
    if wipe:
        for host in HOSTS:
            shutil.rmtree(cluster.disk(host))
    cluster.start("node", *also)
    cluster.wait_ready("node", *also)
    eventually(lambda: cluster.metric("all", "tandem_worker_up") == 4, 60, "workers up")
    eventually(lambda: all(cluster.metric(host, "tandem_worker_up") == 2 for host in HOSTS), 60, "workers up")
    cluster.wait_joined()


def test_text_of_one_host_reaches_the_other_through_every_tier(cluster: Cluster) -> None:
    computed: list[tuple[list[int], Answer]] = []

    def came_from_the_peer() -> bool:
        tokens = cluster.prompt(LENGTH)
        first = cluster.ask("a", tokens)
        assert first.by_tier == {}
        again = cluster.ask("b", tokens)
        assert again.tokens == first.tokens
        computed.append((tokens, first))
        return again.by_tier == {"peer": STORED}

    eventually(came_from_the_peer, what="a hit in the other host's node")
    tokens, first = computed[-1]
    unseen_by_b = cluster.prompt(LENGTH)
    known_to_a = cluster.ask("a", unseen_by_b)
    cluster.flush()

    # Nothing is left in memory: what was on host a's disk serves it, and host b through it.
    kill_nodes(cluster, also=("prefill",))
    again = cluster.ask("a", tokens)
    assert (again.tokens, again.by_tier) == (first.tokens, {"disk": STORED})
    again = cluster.ask("b", unseen_by_b)
    assert (again.tokens, again.by_tier) == (known_to_a.tokens, {"peer": STORED})

    # Nothing is left on the hosts. Host b's prefill worker has not seen this text since it was started.
    kill_nodes(cluster, wipe=True)
    again = cluster.ask("b", tokens)
    assert (again.tokens, again.by_tier) == (first.tokens, {"remote": STORED})

    cluster.check()
    assert cluster.metric("a", "tandem_router_cached_tokens_total", tier="disk") == STORED
    assert cluster.metric("b", "tandem_router_cached_tokens_total", tier="peer") >= 2 * STORED
    assert cluster.metric("b", "tandem_router_cached_tokens_total", tier="remote") == STORED


def test_an_answer_of_one_host_is_a_prefix_on_the_other(cluster: Cluster) -> None:
    def came_from_the_peer() -> bool:
        tokens = cluster.prompt(100)
        turn = [*tokens, *cluster.ask("a", tokens, 150).tokens, *cluster.prompt(20)]
        loaded = cluster.ask("b", turn)
        assert [loaded.tokens] == cluster.cold([turn])
        return loaded.by_tier == {"peer": 249 // CHUNK * CHUNK}

    eventually(came_from_the_peer, what="the answer of host a's decode worker at host b")


@pytest.mark.slow
def test_without_the_secret_nobody_is_let_in_and_everybody_is_served(cluster: Cluster) -> None:
    tokens = cluster.prompt(LENGTH)
    first = cluster.ask("a", tokens)
    on_disk = [cluster.prompt(LENGTH) for _ in range(8)]
    answers = [cluster.ask("a", prompt).tokens for prompt in on_disk]
    cluster.flush("a")
    right = str(cluster["node-a"].settings["secret_file"])
    wrong = cluster.folder / "another secret"
    wrong.write_text("another secret of more than sixteen bytes")
    logs = {name: len(cluster[name].log) for name in ("node-a", "prefill-a", "decode-a", "node-b")}
    try:
        cluster["node-a"].restart(secret_file=str(wrong))
        for worker in ("prefill-a", "decode-a"):
            told = partial(cluster[worker].logged, "has another secret", logs[worker])
            eventually(told, what=f"{worker} says why")

        def b_was_refused() -> bool:
            assert cluster.ask("b", on_disk.pop()).tokens == answers.pop()
            return cluster["node-b"].logged("cannot reach node node-a", logs["node-b"])

        # Host a's disk has it, and the directory says so: host b asks, and is told to go away.
        eventually(lambda: len(cluster.stats("b").known_nodes) == 2, what="both nodes in the directory")
        eventually(b_was_refused, what="host b turned away")
        assert cluster["node-b"].logged("give both the same secret_file", logs["node-b"])
        assert cluster.ask("a", tokens).tokens == first.tokens
        assert cluster.ask("a", cluster.prompt(LENGTH)).by_tier == {}
        assert cluster.stats("a").tiers[0].objects == 0
    finally:
        cluster["node-a"].restart(secret_file=right)
    cluster.wait_joined()
    cluster.crosses("a", "b")
    cluster.crosses("b", "a")
