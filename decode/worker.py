"""A decode worker: takes KV and first tokens from prefill workers, or computes prompts itself, and decodes."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path

from tandem.common.errors import ConfigError
from tandem.common.scratch import scratch_folder
from tandem.common.secret import check_reachable
from tandem.decode.importer import Importer
from tandem.decode.settings import DecodeConfig
from tandem.handover import KvServer
from tandem.kvstore.settings import split_address
from tandem.proto import worker_pb2
from tandem.worker.process import WorkerProcess

EXPIRY_TICK_S = 0.25
HANDOVER_TIMEOUT_S = 3.0
"""A request whose prefill worker has not opened its KV stream after this time is computed here."""


async def serve(config: DecodeConfig) -> None:
    """Runs until SIGTERM. Raises ConfigError for what cannot be loaded or bound."""
    process = WorkerProcess(config, "decode")
    check_reachable(process.secret, "handover_listen", config.handover_listen)
    await process.load()
    with contextlib.ExitStack() as stack:
        if config.listen.startswith("unix:"):  # beside it, so that who removes one after a kill removes both
            path = config.listen.removeprefix("unix:").removesuffix(".sock") + ".kv"
        else:
            path = str(stack.enter_context(scratch_folder()) / "kv.sock")
        pool = process.engine.pool
        importer = Importer(
            row_bytes=pool.row_bytes,
            num_layers=pool.num_layers,
            timeout_s=HANDOVER_TIMEOUT_S,
            near_allowed=config.kv_near,
        )
        tcp = split_address(config.handover_listen, "handover_listen") if config.handover_listen else None
        server = KvServer(Path(path), tcp, process.identity, importer)
        importer.server = server
        try:
            server.start()
        except OSError as error:
            raise ConfigError(f"socket {path!r}, handover_listen {config.handover_listen!r}: {error}") from error
        stack.callback(server.stop)
        expiry = asyncio.create_task(_expire(importer))
        stack.callback(expiry.cancel)
        endpoint = server.endpoint
        await process.serve(
            importer,
            server.stats,
            worker_pb2.KvEndpoint(
                worker_id=endpoint.worker_id,
                worker_epoch=endpoint.worker_epoch,
                host_id=endpoint.host_id,
                unix_path=endpoint.unix_path,
                host=endpoint.host,
                port=endpoint.port,
                near_allowed=config.kv_near,
            ),
        )


async def _expire(importer: Importer) -> None:
    while True:
        await asyncio.sleep(EXPIRY_TICK_S)
        importer.expire()
