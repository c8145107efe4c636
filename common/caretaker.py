"""Ends what a supervisor leaves behind. As a program it waits for the supervisor to be gone, however it went, then
kills every process that belongs to its run folder and removes the folder.

Started by path, `python caretaker.py FOLDER`, with nothing of the project, so that it costs next to nothing. Stdin is
the pipe whose other end the supervisor holds.
"""

import contextlib
import os
import shutil
import signal
import sys
import time

RUN_FOLDER_VARIABLE = "TANDEM_SUPERVISOR_RUN_DIRECTORY"
"""Environment variable of all processes below a supervisor; its value is the run folder."""
PATIENCE_S = 10.0
"""Seconds that it tries: dying processes may still write into the folder."""


def main(folder: str) -> None:
    """Runs until standard input ends, then kills every process of the run folder and removes the folder, for
    `PATIENCE_S` at the most. Ignores SIGINT, SIGTERM and SIGHUP."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    while os.read(0, 1):
        pass
    until = time.monotonic() + PATIENCE_S
    while (end_processes_of(folder) or os.path.lexists(folder)) and time.monotonic() < until:
        shutil.rmtree(folder, ignore_errors=True)
        time.sleep(0.05)


def end_processes_of(folder: str) -> bool:
    """Kills the processes that were started for this run folder, also those that are stopped. False: there are none."""
    mark, found = f"{RUN_FOLDER_VARIABLE}={folder}".encode(), False
    for pid in _processes():
        with contextlib.suppress(OSError):
            with open(f"/proc/{pid}/environ", "rb") as environment:
                belongs = mark in environment.read().split(b"\0")
            if belongs and pid != os.getpid():
                os.kill(pid, signal.SIGKILL)
                found = True
    return found


def end_session(session: int) -> None:
    """Kills what is left of a process session (setsid), such as what its dead leader had started."""
    for pid in _processes():
        with contextlib.suppress(OSError):
            if os.getsid(pid) == session:
                os.kill(pid, signal.SIGKILL)


def _processes() -> list[int]:
    """Empty where the system does not tell."""
    with contextlib.suppress(OSError):
        return [int(name) for name in os.listdir("/proc") if name.isdigit()]
    return []


if __name__ == "__main__":
    main(sys.argv[1])
