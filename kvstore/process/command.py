"""`tandem kvstore`."""

from __future__ import annotations

from collections.abc import Sequence

from tandem.common.settings import parse_settings
from tandem.kvstore.process.process import KvStoreConfig, serve

EXAMPLES = (
    (
        "4 GiB of memory and 100 GiB of disk, shared by the workers of this machine",
        "tandem kvstore --kv-store-socket /run/tandem-kv.sock --kv-host-bytes 4GiB --kv-disk /var/lib/tandem "
        "--kv-disk-bytes 100GiB",
    ),
    ("a worker that uses it", "tandem prefill --model DIR --kv-store-socket /run/tandem-kv.sock"),
    (
        "one of several nodes, with a directory in Redis",
        "tandem kvstore --kv-directory redis://10.0.0.2:6379/0 --kv-peer-listen 10.0.0.5:9301 --secret-file secret",
    ),
)


SETTINGS = KvStoreConfig


def main(argv: Sequence[str]) -> None:
    """Raises ConfigError, or SystemExit after `--help`."""
    serve(
        parse_settings(
            KvStoreConfig,
            argv,
            command="tandem kvstore",
            description="Runs a node of the KV store: memory, disk and remote tiers that the workers of this host use "
            "and the nodes of other hosts read from. `tandem kv` looks into it.",
            examples=EXAMPLES,
        )
    )
