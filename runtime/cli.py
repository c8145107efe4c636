"""The `tandem` command. Imports nothing heavy itself: each subcommand loads what it needs."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from tandem import __version__

USAGE = """\
usage: tandem COMMAND [OPTIONS]

Serves language models with separate prefill and decode workers.

Commands:
  serve     the whole platform on this machine: router, prefill and decode workers
  prefill   one prefill worker
  decode    one decode worker (also computes prompts when there is no prefill worker)
  router    the HTTP and gRPC front door
  kvstore   one node of the KV store, shared by the workers of its host
  kv        look into a store node: stats, lookup, pin, unpin, clear, move, check
  version   print the version

Examples:
  # the bundled small model on http://127.0.0.1:8000
  tandem serve

  # another model, two decode workers, reachable from other machines
  tandem serve --model ~/models/Llama-3.2-1B-Instruct --decode 2 --host 0.0.0.0

  # all settings of a command
  tandem serve --help
"""

_COMMANDS = {
    "serve": "tandem.runtime.serve",
    "prefill": "tandem.prefill.main",
    "decode": "tandem.decode.main",
    "router": "tandem.router.main",
    "kvstore": "tandem.kvstore.command",
    "kv": "tandem.kvstore.admin",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status: 2 for a mistake in the command line or configuration."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(USAGE, end="")
        return 0 if arguments else 2
    command = arguments[0]
    if command in ("version", "--version"):
        print(__version__)
        return 0
    if command not in _COMMANDS:
        print(f"tandem: there is no command {command!r}; see `tandem --help`", file=sys.stderr)
        return 2
    from tandem.runtime.parent import exit_with_parent

    exit_with_parent()
    from tandem.common.errors import ConfigError

    try:
        return int(importlib.import_module(_COMMANDS[command]).main(arguments[1:]) or 0)
    except ConfigError as error:
        print(f"tandem {command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
