"""`tandem kv`: the commands of `admin.py`, with the store node of a running `tandem serve` where none is named."""

from __future__ import annotations

from collections.abc import Sequence

from tandem.common.errors import ConfigError
from tandem.runtime.running import find_running, only_running


def main(argv: Sequence[str]) -> int:
    """Returns the exit status. Raises ConfigError."""
    from tandem.kvstore.process import admin

    return admin.main(argv, _node_that_runs_here)


def _node_that_runs_here(named: str | None) -> tuple[str, str] | None:
    """Address and secret file, of the one that is `named` if it runs here, or of the only one. Raises ConfigError where
    there are several, or a server without a node."""
    if named is not None:
        return next(((each.node, each.secret_file) for each in find_running() if each.node == named), None)
    running = only_running("--node")
    if running is None:
        return None
    if not running.node:
        raise ConfigError(f"the server at {running.url} has no store node of its own; name one with --node")
    return running.node, running.secret_file
