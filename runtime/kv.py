"""`tandem kv`: finds the store node of a running `tandem serve` where none is named, then `kvstore/admin.py`."""

from __future__ import annotations

from collections.abc import Sequence

from tandem.common.errors import ConfigError
from tandem.runtime.running import only_running


def main(argv: Sequence[str]) -> int:
    """Returns the exit status. Raises ConfigError."""
    from tandem.kvstore import admin

    named = any(word.partition("=")[0] == "--node" for word in argv)
    if named or not argv or {"-h", "--help"} & set(argv):
        return admin.main(argv)
    running = only_running("--node")
    if running is None:
        return admin.main(argv)
    if not running.node:
        raise ConfigError(f"the server at {running.url} has no store node of its own; name one with --node")
    found = ["--node", running.node]
    if running.secret_file and not any(word.partition("=")[0] == "--secret-file" for word in argv):
        found += ["--secret-file", running.secret_file]
    return admin.main([*argv, *found])
