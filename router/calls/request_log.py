"""One line in the log per request, and one every ten seconds while there is work.

`key=value` pairs; never a prompt, an answer or a key. Text of clients is quoted, so that no line can be forged. Lines
are written by a thread of their own, in batches: a terminal that has stopped costs lines, never a request.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import queue
import re
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache

from tandem.router.calls.explain import AttemptNote, Record

FLUSH_S = 0.2
MAX_LINES = 10_000
"""Lines that wait to be written; more are left out, and how many is said."""
MAX_VALUE_CHARACTERS = 100
_PLAIN = re.compile(r"[A-Za-z0-9._:/+\-]+")

Value = str | int | float | None


class RequestLog:
    """`note` from the event loop; `close` in the end."""

    def __init__(self, process: str = "router", write: Callable[[str], object] | None = None) -> None:
        """`write`: to stderr if None; called on the thread."""
        self._process = process
        self._write = write or _to_stderr
        self._lines: list[str] = []
        self._left_out = 0
        self._unwritten = 0
        """Lines that the thread has and has not written yet."""
        self._timer: asyncio.TimerHandle | None = None
        self._batches: queue.SimpleQueue[tuple[str, int] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def note(self, what: str, pairs: str) -> None:
        """`pairs`: made by `request_pairs` or `pairs_of`."""
        if len(self._lines) + self._unwritten >= MAX_LINES:
            self._left_out += 1
            return
        self._lines.append(line_of(self._process, time.time(), what, pairs))
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(FLUSH_S, self._flush)

    def close(self, wait_s: float = 1.0) -> None:
        """Writes what is left, unless that takes longer."""
        if self._timer is not None:
            self._timer.cancel()
            self._flush()
        if self._thread is not None:
            self._batches.put(None)
            self._thread.join(wait_s)
            self._thread = None

    def _flush(self) -> None:
        self._timer = None
        if self._thread is None:
            self._thread = threading.Thread(target=self._write_batches, name="request-log", daemon=True)
            self._thread.start()
        if self._left_out and len(self._lines) < MAX_LINES:
            what, pairs = "lines that could not be written in time", f"left_out={self._left_out}"
            self._lines.append(line_of(self._process, time.time(), what, pairs))
            self._left_out = 0
        lines, self._lines = self._lines, []
        self._unwritten += len(lines)
        self._batches.put(("".join(lines), len(lines)))

    def _write_batches(self) -> None:
        while (batch := self._batches.get()) is not None:
            text, count = batch
            with contextlib.suppress(OSError, ValueError):  # nobody reads stderr any more
                self._write(text)
            self._unwritten -= count


def line_of(process: str, at: float, what: str, pairs: str) -> str:
    """A line in the form of `common/telemetry.py`."""
    second = int(at)
    return f"{_stamp(second)}.{int((at - second) * 1000):03d}Z INFO {process} {__name__}: {what} {pairs}\n"


def pairs_of(values: Mapping[str, Value]) -> str:
    """The values as text, without those that are None."""
    return " ".join(
        [
            f"{name}={shown(value) if isinstance(value, str) else value}"
            for name, value in values.items()
            if value is not None
        ]
    )


def request_pairs(
    record: Record | None, *, request_id: str, tenant: str, call: str, status: str, model: str, total_s: float
) -> str:
    """`record`: of what was generated; None where nothing was. `call`: such as `POST /v1/completions`. Made for every
    request, so it is written out. Of `request_id` and `status` nothing need be quoted."""
    text = f"id={request_id} tenant={shown(tenant)} call={shown(call)} status={status}"
    if record is not None:
        text += f" model={shown(model)} outcome={record.outcome}"
        attempts = record.attempts
        if attempts:
            text += f" finish={_finish(attempts)}"
        text += (
            f" prompt_tokens={record.prompt_tokens} cached_tokens={record.cached_tokens}"
            f" output_tokens={record.output_tokens}"
        )
        if record.granted_s is not None:
            text += f" queue_ms={record.granted_s * 1000:.1f}"
        firsts = [note.first_token_s for note in attempts if note.first_token_s is not None]
        if firsts:
            text += f" ttft_ms={min(firsts) * 1000:.1f}"
        if attempts:
            last = attempts[-1]
            text += f" worker={shown(last.decode)}"
            if last.prefill is not None:
                text += f" prefill={shown(last.prefill)}"
            if len(attempts) > record.choices:
                text += f" attempts={len(attempts)}"
    return f"{text} total_ms={total_s * 1000:.1f}"


@lru_cache(maxsize=1024)
def shown(text: str) -> str:
    """The text as it is where it is plain, else as a JSON string, cut."""
    if _PLAIN.fullmatch(text) and len(text) <= MAX_VALUE_CHARACTERS:
        return text
    return json.dumps(text if len(text) <= MAX_VALUE_CHARACTERS else text[:MAX_VALUE_CHARACTERS] + "...")


def _finish(attempts: Sequence[AttemptNote]) -> str:
    """How the choices ended, each way once."""
    if len(attempts) == 1:
        return shown(attempts[0].ended or "cut")
    return shown(",".join(dict.fromkeys({note.choice: note.ended or "cut" for note in attempts}.values())))


@lru_cache(maxsize=2)
def _stamp(second: int) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(second))


def _to_stderr(text: str) -> None:
    sys.stderr.write(text)
    sys.stderr.flush()
