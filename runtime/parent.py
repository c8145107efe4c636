"""Ends a child of the supervisor when the supervisor is gone, even after kill -9.

The supervisor holds the only write end of a pipe whose read end is the child's stdin. It never writes; the kernel
closes it with the process.
"""

from __future__ import annotations

import os
import shutil
import threading

RUN_DIRECTORY_VARIABLE = "TANDEM_SUPERVISOR_RUN_DIRECTORY"
"""Set by the supervisor for its children: the private folder to remove when nobody else is left to do it."""


def is_child() -> bool:
    """Whether this process is a supervisor's child."""
    return RUN_DIRECTORY_VARIABLE in os.environ


def exit_with_parent() -> None:
    """Watches stdin from a daemon thread if this process is a supervisor's child; else does nothing."""
    run_directory = os.environ.get(RUN_DIRECTORY_VARIABLE)
    if run_directory is None:
        return

    def watch() -> None:
        while os.read(0, 1):
            pass
        # Nobody reads stderr any more, so there is nothing to say.
        shutil.rmtree(run_directory, ignore_errors=True)
        os._exit(1)

    threading.Thread(target=watch, name="parent-watch", daemon=True).start()
