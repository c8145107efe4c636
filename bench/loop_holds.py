"""How long one request holds a router, and what that does to another tenant beside it.

    python bench/loop_holds.py [KIND ...]

A router runs in this process before two fake workers, a token every 2 ms. A victim asks it for small chats one after
the other; an attacker, a tenant of its own, sends each kind of heavy request a few times, two at once. Both are
processes of their own. For each kind: the longest hold of the event loop, by the wall and in processor time of the
whole process meanwhile (which a busy machine does not lengthen); the victim's times; what the attacker was answered;
and the most memory that the process has had.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import http.client
import json
import resource
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]

from systems import machine  # noqa: E402

MODEL = ROOT / "examples/small_model/model"
TICK_S = 0.001
AT_ONCE = 2
REPEATS = 3
LIMIT = 8 << 20
"""The router's own, of a body."""
ALONE = "alone"

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
_PROSE = "The river ran past the old mill and under the bridge. "


def _ask(path: str, **body: object) -> tuple[str, bytes]:
    return path, json.dumps(body).encode()


def _raw(path: str, before: str, repeated: str, after: str) -> tuple[str, bytes]:
    """As often as a body may hold it."""
    count = (LIMIT - 1000) // len(repeated)
    return path, (before + repeated * count).rstrip(",").encode() + after.encode()


def _user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


KINDS: dict[str, Callable[[], tuple[str, bytes]]] = {
    ALONE: lambda: _ask("/tokenize", prompt="a"),
    "tokenize 4 MB": lambda: _ask("/tokenize", prompt=_PROSE * 76_000),
    "tokenize 4 MB, strings": lambda: _ask("/tokenize", prompt=_PROSE * 76_000, return_token_strs=True),
    "tokenize one word": lambda: _ask("/tokenize", prompt="a" * 4_000_000),
    "tokenize emoji": lambda: _ask("/tokenize", prompt="\U0001f600" * 600_000),
    "detokenize ids": lambda: _raw("/detokenize", '{"tokens": [', "300,", "]}"),
    "detokenize 500,000": lambda: _ask("/detokenize", tokens=[300] * 500_000),
    "ids": lambda: _raw(TEXT, '{"prompt": [', "1,", "]}"),
    "ids, 500,000": lambda: _ask(TEXT, prompt=[300] * 500_000),
    "prompts": lambda: _raw(TEXT, '{"prompt": [', '"a",', "]}"),
    "lists of ids": lambda: _raw(TEXT, '{"prompt": [', "[],", "]}"),
    "digits": lambda: _raw(TEXT, '{"prompt": [', "9" * 4000 + ",", "]}"),
    "messages": lambda: _raw(CHAT, '{"messages": [', '{"role":"user","content":""},', "]}"),
    "messages, 20,000": lambda: _ask(CHAT, messages=_user("a") * 20_000),
    "messages with others' fields": lambda: _raw(CHAT, '{"messages": [', '{"role":"user","content":"","x":1},', "]}"),
    "turns of one side": lambda: _ask("/v1/messages", messages=_user("a" * 300) * 20_000, max_tokens=3),
    "function calls": lambda: _ask(
        "/v1/responses", input=[{"type": "function_call", "call_id": "c", "name": "f"}] * 20_000
    ),
    "count_tokens": lambda: _ask("/v1/messages/count_tokens", messages=_user(_PROSE * 140_000)),
    "long prompt": lambda: _ask(TEXT, prompt=_PROSE * 140_000),
    "response_format": lambda: _raw(
        CHAT,
        '{"messages": [{"role":"user","content":"a"}], "response_format": {"type": "json_schema", "json_schema": '
        '{"schema": {"enum": [',
        "12,",
        "]}}}}",
    ),
    "response_format, text": lambda: _ask(
        CHAT,
        messages=_user("a"),
        response_format={"type": "json_schema", "json_schema": {"schema": {"title": "a" * 7_000_000}}},
    ),
    "guided_json": lambda: _ask(TEXT, prompt="a", guided_json='{"enum": [' + "1," * 3_000_000 + "1]}"),
    "template's variables": lambda: _raw(
        CHAT, '{"messages": [{"role":"user","content":"a"}], "chat_template_kwargs": {"x": [', "1,", "]}}"
    ),
    "logit_bias": lambda: (
        TEXT,
        b'{"prompt": "a", "logit_bias": {' + b",".join(b'"%d":1' % number for number in range(600_000)) + b"}}",
    ),
    "allowed ids of 64 choices": lambda: _ask(
        TEXT, prompt=["a"] * 4, n=16, temperature=1, max_tokens=2, allowed_token_ids=list(range(4096))
    ),
    "bad_words": lambda: _ask(TEXT, prompt="a", max_tokens=2, bad_words=[f"{n:03}" + "é" * 250 for n in range(256)]),
    "stop strings": lambda: _ask(
        TEXT,
        prompt=[68, 68],
        n=16,
        temperature=1,
        max_tokens=500,
        stop=["a" * 999 + c for c in "bcdefghijklmnopq"],
    ),
    "64 long prompts": lambda: _ask(TEXT, prompt=[[300 + n, *[301] * 2000] for n in range(64)], max_tokens=1),
    "echo and logprobs": lambda: _ask(
        TEXT, prompt=[[300] * 2000] * 64, max_tokens=1, echo=True, logprobs=5, return_token_ids=True
    ),
    "logprobs": lambda: _ask(
        CHAT, messages=_user("a"), n=16, temperature=1, max_tokens=1900, logprobs=True, top_logprobs=20
    ),
    "embeddings": lambda: _ask("/v1/embeddings", input=[_PROSE * 70] * 2000),
    "not JSON": lambda: (TEXT, b'{"prompt": "' + b"a" * (LIMIT - 100)),
}


@dataclass
class Ticks:
    """Gaps between two turns of the event loop."""

    longest_s: float = 0.0
    longest_cpu_s: float = 0.0

    async def run(self) -> None:
        wall, cpu = time.perf_counter(), time.process_time()
        while True:
            await asyncio.sleep(TICK_S)
            before, wall = wall, time.perf_counter()
            before_cpu, cpu = cpu, time.process_time()
            self.longest_s = max(self.longest_s, wall - before - TICK_S)
            self.longest_cpu_s = max(self.longest_cpu_s, cpu - before_cpu)


def post(port: int, path: str, body: bytes, key: str) -> int:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=300)
    try:
        connection.request("POST", path, body, {"authorization": f"Bearer {key}", "content-type": "application/json"})
        answer = connection.getresponse()
        while answer.read(1 << 20):
            pass
        return answer.status
    except OSError:
        return 0
    finally:
        connection.close()


def attack(kind: str, port: int) -> None:
    """A process of its own: says `ready`, waits for a line, and says how it was answered."""
    path, body = KINDS[kind]()
    print("ready", flush=True)
    sys.stdin.readline()
    with ThreadPoolExecutor(AT_ONCE) as threads:
        statuses = Counter(threads.map(lambda _: post(port, path, body, "attacker"), range(AT_ONCE * REPEATS)))
    print(json.dumps(statuses), flush=True)


def be_victim(port: int) -> None:
    """A process of its own: until a line comes, one small chat after the other; then says how long they took."""
    body = json.dumps({"messages": _user("Who are you?"), "max_tokens": 3, "temperature": 0}).encode()
    times: list[float] = []
    failed = 0
    print("ready", flush=True)
    with ThreadPoolExecutor(1) as reader:
        stopped = reader.submit(sys.stdin.readline)
        while not stopped.done():
            started = time.perf_counter()
            failed += post(port, CHAT, body, "victim") != 200
            times.append(time.perf_counter() - started)
    times.sort()
    at = lambda share: round(1e3 * times[min(len(times) - 1, int(share * len(times)))], 1)  # noqa: E731
    print(json.dumps({"asked": len(times), "failed": failed, "p50_ms": at(0.5), "p99_ms": at(0.99), "max_ms": at(1)}))


async def started(*command: str) -> asyncio.subprocess.Process:
    """A process of Python, once it has said something."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, *command, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
    )
    assert process.stdout is not None
    await process.stdout.readline()
    return process


async def told(process: asyncio.subprocess.Process) -> dict[str, object]:
    """What a child says once it has got its line."""
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(b"\n")
    line = await process.stdout.readline()
    await process.wait()
    answer: dict[str, object] = json.loads(line)
    return answer


async def measure(kinds: list[str]) -> list[dict[str, object]]:
    from router_http import free_ports
    from router_workers import sockets

    from tandem.router.app import Router
    from tandem.router.main import spare_collector
    from tandem.router.settings import RouterConfig

    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tenants = folder / "tenants.yaml"
        keys = {tenant: hashlib.sha256(tenant.encode()).hexdigest() for tenant in ("attacker", "victim")}
        tenants.write_text("tenants:\n" + "".join(f"- name: {name}\n  keys: [{key}]\n" for name, key in keys.items()))
        paths = sockets(folder, 2)
        workers = await started(str(ROOT / "bench/router_workers.py"), name, *map(str, free_ports(len(paths))))
        targets = [f"unix:{path}" for path in paths]
        config = RouterConfig(
            model=str(MODEL),
            port=0,
            decode_workers=targets,
            tenants_file=tenants,
            log_level="error",
            log_requests=False,
        )
        router = Router(config)
        await router.start()
        while not router.service.ready:  # noqa: ASYNC110 - the workers are other processes
            await asyncio.sleep(0.05)
        spare_collector()
        for kind in kinds:
            attacker = await started(__file__, "--attack", kind, "--port", str(router.port))
            victim = await started(__file__, "--victim", "--port", str(router.port))
            await asyncio.sleep(1.0)
            ticks = Ticks()
            ticking = asyncio.create_task(ticks.run())
            began = time.perf_counter()
            answers = await told(attacker)
            took_s = time.perf_counter() - began
            ticking.cancel()
            row = {
                "kind": kind,
                "hold_ms": round(1e3 * ticks.longest_s, 1),
                "hold_cpu_ms": round(1e3 * ticks.longest_cpu_s, 1),
                "attack_s": round(took_s, 2),
                "answers": answers,
                "victim": await told(victim),
                "memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10,
            }
            print(json.dumps(row), file=sys.stderr, flush=True)
            rows.append(row)
        await router.stop()
        workers.kill()
        await workers.wait()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kinds", nargs="*", help=f"of {', '.join(KINDS)}; default: all")
    parser.add_argument("--attack", help=argparse.SUPPRESS)
    parser.add_argument("--victim", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    args = parser.parse_args()
    if args.attack:
        attack(args.attack, args.port)
        return
    if args.victim:
        be_victim(args.port)
        return
    import uvloop

    rows = uvloop.run(measure(args.kinds or list(KINDS)))
    text = json.dumps({"machine": machine("uvloop", "uvicorn"), "rows": rows}, indent=1)
    print(text)
    if args.out:
        args.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
