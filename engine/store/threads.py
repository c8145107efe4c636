"""Threads that do for the engine what may block: ask the store, wait for its bytes, copy rows."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from typing import Protocol

logger = logging.getLogger(__name__)


class Job(Protocol):
    """Exactly one of the two is called, once."""

    def run(self) -> None:
        """Does the job, on a thread of the workers."""

    def drop(self) -> None:
        """The workers stop: give back what the job holds, and do nothing else."""


class Workers:
    """`count` threads and a queue of at most `limit` jobs. The threads start with the first job."""

    def __init__(self, name: str, count: int, limit: int) -> None:
        self._limit = limit
        self._jobs: deque[Job] = deque()
        self._changed = threading.Condition()
        self._busy = 0
        self._stopping = False
        self._started = False
        self._threads = [
            threading.Thread(target=self._work, name=f"{name}-{index}", daemon=True) for index in range(count)
        ]

    def put(self, job: Job) -> bool:
        """False: the queue is full, or the workers have stopped; `job` is the caller's still."""
        with self._changed:
            if self._stopping or len(self._jobs) >= self._limit:
                return False
            if not self._started:
                self._started = True
                for thread in self._threads:
                    thread.start()
            self._jobs.append(job)
            self._changed.notify()
        return True

    def wait_idle(self, timeout_s: float) -> bool:
        """Waits until every job that was put has ended. False: time is up."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._jobs and not self._busy, timeout_s)

    def stop(self, timeout_s: float) -> bool:
        """Drops what is queued and waits for what runs. False: something still runs after `timeout_s`."""
        with self._changed:
            self._stopping = True
            dropped, self._jobs = list(self._jobs), deque()
            self._changed.notify_all()
        for job in dropped:
            job.drop()
        end = time.monotonic() + timeout_s
        for thread in self._threads:
            if thread.ident is not None:
                thread.join(max(end - time.monotonic(), 0.0))
        return not any(thread.is_alive() for thread in self._threads)

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._jobs or self._stopping)
                if self._stopping:
                    return
                job = self._jobs.popleft()
                self._busy += 1
            try:
                job.run()
            except Exception:
                logger.exception("a job of %s failed", threading.current_thread().name)
            finally:
                with self._changed:
                    self._busy -= 1
                    self._changed.notify_all()
