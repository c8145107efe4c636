"""The `tandem` command. Imports nothing heavy itself: each subcommand loads what it needs."""

from __future__ import annotations

import difflib
import importlib
import os
import sys
from collections.abc import Sequence

from tandem import __version__

USAGE = """\
usage: tandem COMMAND [OPTIONS]

Serves language models with separate prefill and decode workers.

Commands:
  serve     the whole platform on this machine: router, prefill and decode workers
  chat      talk to a running server
  status    what a running server does
  drain     empty a worker, so that it can be stopped
  profile   measure a running worker, for the planner
  prefill   one prefill worker
  decode    one decode worker (also computes prompts when there is no prefill worker)
  router    the HTTP and gRPC front door
  kvstore   one node of the KV store, shared by the workers of its host
  plan      which hardware, and how many replicas of what, for a demand
  kv        look into a store node: stats, lookup, pin, unpin, clear, move, check
  completion
            completion of this command line, for bash, zsh or fish
  version   print the version

Examples:
  # the bundled small model on http://127.0.0.1:8000
  tandem serve

  # another model, two decode workers, reachable from other machines
  tandem serve ~/models/Llama-3.2-1B-Instruct --decode 2 --host 0.0.0.0

  # all settings of a command
  tandem serve --help
"""

COMMANDS = {
    "serve": "tandem.runtime.serve",
    "prefill": "tandem.prefill.main",
    "decode": "tandem.decode.main",
    "router": "tandem.runtime.router",
    "kvstore": "tandem.kvstore.process.command",
    "kv": "tandem.runtime.kv",
    "chat": "tandem.runtime.chat",
    "status": "tandem.runtime.status",
    "drain": "tandem.runtime.drain",
    "plan": "tandem.runtime.plan",
    "profile": "tandem.runtime.profile",
    "completion": "tandem.runtime.completion",
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
    if command not in COMMANDS:
        close = difflib.get_close_matches(command, COMMANDS, 1)
        hint = f"; did you mean {close[0]}?" if close else ""
        print(f"tandem: there is no command {command[:40]!r}{hint} See `tandem --help`.", file=sys.stderr)
        return 2
    # Strangers who fail at a handshake would fill the log: the library writes a line for each.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    from tandem.runtime.child import ERROR_PREFIX
    from tandem.runtime.parent import exit_with_parent, is_child

    exit_with_parent()
    os.umask(0o077)  # whatever a command writes may be a tenant's
    from tandem.common.errors import ConfigError

    try:
        return _run(command, arguments[1:])
    except ConfigError as error:
        message = str(error)
        if is_child():  # who started it says so once, whoever else meets the same error
            line = " ".join(message.splitlines()).encode("utf-8", "backslashreplace").decode()
            print(f"{ERROR_PREFIX}{line}", flush=True)
        else:
            print(f"tandem {command}: {message}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # whoever read the output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        return 130


def _run(command: str, arguments: Sequence[str]) -> int:
    """Raises ConfigError that names settings as flags."""
    from tandem.common.errors import ConfigError
    from tandem.runtime.shortage import check_address_space, explained

    check_address_space(command)
    try:
        module = importlib.import_module(COMMANDS[command])
        return int(module.main(arguments) or 0)
    except ConfigError as error:
        from tandem.common.settings import settings_of, with_dashes

        raise ConfigError(
            with_dashes(str(error), settings_of(module.SETTINGS)) if hasattr(module, "SETTINGS") else str(error)
        ) from error
    except Exception as error:
        if (shortage := explained(error)) is None:
            raise
        raise shortage from error


if __name__ == "__main__":
    sys.exit(main())
