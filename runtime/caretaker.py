"""The process that removes a supervisor's run folder once the supervisor is gone, however it went.

Started by path, `python caretaker.py FOLDER`, with nothing of the project, so that it costs next to nothing. Stdin is
the pipe whose other end the supervisor holds.
"""

import os
import shutil
import signal
import sys
import time

PATIENCE_S = 10.0
"""For children that die with the supervisor and may still write."""


def main(folder: str) -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    while os.read(0, 1):
        pass
    until = time.monotonic() + PATIENCE_S
    while os.path.lexists(folder) and time.monotonic() < until:
        shutil.rmtree(folder, ignore_errors=True)
        time.sleep(0.05)


if __name__ == "__main__":
    main(sys.argv[1])
