"""The router as a process of its own: what it prints, weighs, imports, and how it ends."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from pathlib import Path
from typing import IO

import httpx
import psutil
import pytest

from tests.ports import free_port
from tests.router.conftest import House, until
from tests.router.fake_worker import FakeWorker, Script

pytestmark = pytest.mark.processes

PROGRAM = "import sys; from tandem.runtime.cli import main; sys.exit(main(['router', *sys.argv[1:]]))"
MAX_RSS_MIB = 130


class Process:
    def __init__(self, process: asyncio.subprocess.Process, port: int) -> None:
        self.process = process
        self.url = f"http://127.0.0.1:{port}"

    async def line(self) -> str:
        assert self.process.stdout is not None
        return (await asyncio.wait_for(self.process.stdout.readline(), 90)).decode()


async def start(worker: FakeWorker, model: Path, *flags: str, stderr: IO[bytes] | None = None) -> Process:
    port = free_port()
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", PROGRAM, f"--model={model}", f"--decode-workers=[{worker.target}]", f"--port={port}"),
        *flags,
        stdout=asyncio.subprocess.PIPE,
        stderr=stderr,
    )
    return Process(process, port)


async def closed(url: str) -> None:
    """Returns when nobody accepts connections any more."""
    async with asyncio.timeout(30), httpx.AsyncClient(base_url=url, trust_env=False) as client:
        with contextlib.suppress(httpx.TransportError):
            while True:
                await client.get("/healthz", headers={"connection": "close"})


async def test_prints_one_line_stays_small_and_drains_on_sigterm(house: House) -> None:
    worker = await house.decode(script=Script(hold_after=1))
    router = await start(worker, house.model, "--grpc-port=0")
    try:
        assert (await router.line()).startswith(f"tandem router ready: {router.url} serves tiny")
        async with httpx.AsyncClient(base_url=router.url, trust_env=False, timeout=60) as client:
            worker.script = Script()
            for _ in range(20):
                body = {"messages": [{"role": "user", "content": "Hello " * 50}], "max_tokens": 20}
                assert (await client.post("/v1/chat/completions", json=body)).status_code == 200
            rss = psutil.Process(router.process.pid).memory_info().rss / 2**20
            assert rss < MAX_RSS_MIB, f"{rss:.0f} MiB"
            worker.script = Script(hold_after=1)
            last = asyncio.create_task(client.post("/v1/completions", json={"prompt": "Hello", "max_tokens": 3}))
            await until(lambda: len(worker.submits) == 21)
            os.kill(router.process.pid, signal.SIGTERM)
            await closed(router.url)
            worker.resume.set()
            assert (await last).status_code == 200
        assert await asyncio.wait_for(router.process.wait(), 10) == 0
    finally:
        if router.process.returncode is None:
            router.process.kill()
            await router.process.wait()


async def test_never_imports_torch(house: House) -> None:
    program = (
        "import sys, tandem.router.app, tandem.router.main\n"
        "print([name for name in sys.modules if name.split('.')[0] == 'torch' or name.startswith('tandem.engine')])"
    )
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", program, stdout=asyncio.subprocess.PIPE)
    output, _ = await process.communicate()
    assert output.decode().strip() == "[]"
