"""`tandem serve`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from tandem.common.secret import write_secret
from tandem.common.settings import parse_settings
from tandem.router.place import bind
from tandem.runtime.devices import free_on_gpus
from tandem.runtime.preflight import checked
from tandem.runtime.processes import ProcessSpec, processes_of, ready_text, served_name
from tandem.runtime.running import announce, reachable
from tandem.runtime.secret import FILE, secret_of
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
    with bind(config.host, config.port) as listening:
        config = checked(config)
        free = free_on_gpus(config.device)
        secret = secret_of(config)
        from tandem.runtime.supervisor import Deployment, supervise

        port = listening.getsockname()[1]
        url = f"http://{reachable(config.host)}:{port}"

        def processes(run_folder: Path) -> list[ProcessSpec]:
            """The children to run. Writes the deployment's secret and the file by which other commands find this
            server."""
            secret_file = run_folder / FILE
            write_secret(secret_file, secret)
            specs = processes_of(replace(config, secret_file=str(secret_file)), run_folder, port, free)
            node = next((str(spec.settings["listen"]) for spec in specs if spec.command == "kvstore"), "")
            announce(run_folder, url, served_name(config), node, str(secret_file))
            return specs

        return supervise(
            Deployment(
                processes,
                ServeConfig,
                listening,
                drain_grace_s=config.drain_grace_s,
                secret=secret,
                ready_text=lambda seconds: ready_text(config, url, seconds),
                variables={"OMP_NUM_THREADS": str(config.num_threads)},
            )
        )
