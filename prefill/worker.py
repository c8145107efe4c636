"""A prefill worker: computes prompts and hands KV and first token to decode workers. Keeps nothing in between."""

from __future__ import annotations

from tandem.handover import KvClientPool
from tandem.prefill.exporter import Exporter
from tandem.prefill.settings import PrefillConfig
from tandem.worker.process import WorkerProcess


async def serve(config: PrefillConfig) -> None:
    """Runs until SIGTERM. Raises ConfigError for what cannot be loaded or bound."""
    process = WorkerProcess(config, "prefill")
    await process.load()
    transport = KvClientPool(process.identity)
    try:
        exporter = Exporter(process.engine, transport, process.worker_id)
        await process.serve(exporter, transport.stats, kv_endpoint=None)
    finally:
        transport.close()
