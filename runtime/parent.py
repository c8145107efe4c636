"""The child's side of supervision: it ends when its supervisor is gone, even after kill -9, and says where it hangs.

The kernel kills it with the supervisor (`die_with_parent`). Where that is forbidden, a pipe tells: the supervisor holds
the only write end of the one whose read end is the child's stdin, and never writes.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import threading

from tandem.common.caretaker import RUN_FOLDER_VARIABLE
from tandem.common.ending import die_with_parent, is_orphan

SUPERVISOR_VARIABLE = "TANDEM_SUPERVISOR_PID"
WHERE_SIGNAL = signal.SIGUSR2
"""A child that gets it writes where its threads are to stderr, even where it hangs."""


def is_child() -> bool:
    """Whether this process is a supervisor's child."""
    return RUN_FOLDER_VARIABLE in os.environ


def exit_with_parent() -> None:
    """Does nothing unless this process is a supervisor's child."""
    if not is_child():
        return
    faulthandler.register(WHERE_SIGNAL, all_threads=True)
    die_with_parent()
    if is_orphan(int(os.environ[SUPERVISOR_VARIABLE])):
        os._exit(1)

    def watch() -> None:
        while os.read(0, 1):
            pass
        os._exit(1)  # nobody reads stderr any more, so there is nothing to say

    threading.Thread(target=watch, name="parent-watch", daemon=True).start()
