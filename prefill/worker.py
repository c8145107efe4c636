"""A prefill worker: computes prompts and hands KV and first token to decode workers. Keeps nothing in between."""

from __future__ import annotations

import asyncio

from tandem.handover import KvClient
from tandem.prefill.exporter import Exporter
from tandem.prefill.settings import PrefillConfig
from tandem.worker.process import WorkerProcess

EXPIRY_TICK_S = 0.25


async def serve(config: PrefillConfig) -> None:
    """Runs until SIGTERM. Raises ConfigError for what cannot be loaded or bound."""
    process = WorkerProcess(config, "prefill")
    await process.load()
    transport = KvClient(process.identity)
    try:
        exporter = Exporter(process.engine, transport, process.worker_id)
        expiry = asyncio.create_task(_expire(exporter))
        try:
            await process.serve(exporter, transport.stats, kv_endpoint=None)
        finally:
            expiry.cancel()
    finally:
        transport.close()


async def _expire(exporter: Exporter) -> None:
    while True:
        await asyncio.sleep(EXPIRY_TICK_S)
        exporter.expire()
