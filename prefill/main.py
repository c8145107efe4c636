"""`tandem prefill`."""

from __future__ import annotations

from collections.abc import Sequence

from tandem.common.settings import parse_settings
from tandem.prefill.settings import PrefillConfig

EXAMPLES = (
    ("a worker on this machine", "tandem prefill --model DIR --listen unix:/tmp/prefill-0.sock"),
    ("for routers on other machines", "tandem prefill --model DIR --listen 10.0.0.4:9100 --secret-file secret"),
    ("settings from the environment", "TANDEM_MODEL=DIR TANDEM_NUM_THREADS=4 tandem prefill"),
)


SETTINGS = PrefillConfig


def main(argv: Sequence[str]) -> None:
    """Raises ConfigError, or SystemExit after `--help`."""
    config = parse_settings(
        PrefillConfig,
        argv,
        command="tandem prefill",
        description="Runs a worker that computes prompts and hands KV cache and first token to decode workers.",
        examples=EXAMPLES,
    )
    import uvloop

    from tandem.prefill.worker import serve

    uvloop.run(serve(config))
