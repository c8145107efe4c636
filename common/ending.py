"""How processes end: asked once they finish what they have, and no later than their deadline, whatever hangs."""

from __future__ import annotations

import ctypes
import faulthandler
import os
import signal

LATE_S = 5.0
"""What a process may take beyond what its drain may take, before it ends itself."""
_PR_SET_PDEATHSIG = 1


def ending_signals() -> list[signal.Signals]:
    """Those that ask a process to end. A terminal that is closed asks as well, unless `nohup` or the like had it
    ignored."""
    asks = [signal.SIGTERM, signal.SIGINT]
    return asks if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else [*asks, signal.SIGHUP]


def end_within(seconds: float) -> None:
    """Limits the life of this process from now on: should it still be there after `seconds`, it says where its threads
    are and ends with status 1. Needs neither the event loop nor Python's lock."""
    faulthandler.dump_traceback_later(seconds, exit=True)


def die_with_parent() -> None:
    """The kernel kills this process as soon as the thread that started it is gone, even where it is stopped or hangs.
    A parent that is gone already is not noticed."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)


def is_orphan(parent: int) -> bool:
    """Whether process `parent` is this one's parent no more."""
    return os.getppid() != parent
