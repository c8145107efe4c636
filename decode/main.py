"""`tandem decode`."""

from __future__ import annotations

from collections.abc import Sequence

from tandem.common.settings import parse_settings
from tandem.decode.settings import DecodeConfig

EXAMPLES = (
    ("a worker on this machine", "tandem decode --model DIR --listen unix:/tmp/decode-0.sock"),
    (
        "reachable from other machines, KV included",
        "tandem decode --model DIR --listen 10.0.0.5:9200 --handover-listen 10.0.0.5:9201 --secret-file secret",
    ),
    ("settings from a file", "tandem decode --config decode.yaml --log-level debug"),
)


SETTINGS = DecodeConfig


def main(argv: Sequence[str]) -> None:
    """Raises ConfigError, or SystemExit after `--help`."""
    config = parse_settings(
        DecodeConfig,
        argv,
        command="tandem decode",
        description="Runs a worker that takes KV cache and first tokens from prefill workers, or computes prompts "
        "itself, and generates the rest.",
        examples=EXAMPLES,
    )
    import uvloop

    from tandem.decode.worker import serve

    uvloop.run(serve(config))
