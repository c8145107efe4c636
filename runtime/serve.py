"""`tandem serve`."""

from __future__ import annotations

import asyncio
import errno
import socket
from collections.abc import Sequence

from tandem.common.errors import ConfigError
from tandem.common.settings import parse_settings
from tandem.runtime.preflight import checked
from tandem.runtime.secret import secret_of
from tandem.runtime.settings import ServeConfig
from tandem.runtime.vllm_flags import SHORT_FLAGS, VLLM_FLAGS

EXAMPLES = (
    ("the bundled small model on http://127.0.0.1:8000", "tandem serve"),
    ("your model, reachable from other machines", "tandem serve DIR --host 0.0.0.0 --port 8080"),
    ("two workers that prefill and decode by themselves", "tandem serve --prefill 0 --decode 2"),
    ("more memory for KV cache in each worker", "tandem serve --kv-cache-bytes 2GiB --max-model-len 8192"),
    (
        "tenants with keys, weights and limits (docs/tenants.md), and a folder for /v1/files and /v1/batches",
        "tandem serve --tenants-file tenants.yaml --storage files",
    ),
    (
        "four router processes on one port, whose limits and fairness hold for all of them together",
        "tandem serve --routers 4 --tenants-file tenants.yaml --redis redis://127.0.0.1:6379",
    ),
    ("the same from a file", "tandem serve --config serve.yaml"),
)


SETTINGS = ServeConfig


def main(argv: Sequence[str]) -> int:
    """Returns the exit status. Raises ConfigError, or SystemExit after `--help`."""
    config = parse_settings(
        ServeConfig,
        argv,
        command="tandem serve",
        description="Runs the whole platform on this machine: a router, prefill workers and decode workers, each in a "
        "process of its own, restarted when it crashes. Ctrl-C or SIGTERM finishes running requests first.",
        examples=EXAMPLES,
        foreign=VLLM_FLAGS,
        short=SHORT_FLAGS,
    )
    port = free_port(config.host, config.port)
    config = checked(config)
    secret = secret_of(config)
    from tandem.runtime.supervisor import Supervisor

    async def run() -> int:
        return await Supervisor(config, port, secret).run()

    return asyncio.run(run())


def free_port(host: str, port: int) -> int:
    """`port` if it can be listened on, or any free one for 0. Raises ConfigError otherwise: before workers load."""
    try:
        with socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET) as server:
            return int(server.getsockname()[1])
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise ConfigError(
                f"--port {port}: in use on {host} already; choose another one, or 0 for any free one"
            ) from error
        raise ConfigError(f"--host {host} --port {port}: cannot be listened on ({error.strerror or error})") from error
