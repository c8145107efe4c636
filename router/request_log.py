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
from collections.abc import Callable, Mapping

from tandem.router.explain import Record

FLUSH_S = 0.2
MAX_LINES = 10_000
"""That wait to be written; more are left out, and how many is said."""
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

    def note(self, what: str, values: Mapping[str, Value]) -> None:
        """`what` and then `values`, without those that are None."""
        if len(self._lines) + self._unwritten >= MAX_LINES:
            self._left_out += 1
            return
        self._lines.append(line_of(self._process, time.time(), what, values))
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
            values = {"left_out": self._left_out}
            self._lines.append(line_of(self._process, time.time(), "lines that could not be written in time", values))
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


def line_of(process: str, at: float, what: str, values: Mapping[str, Value]) -> str:
    """As `common/telemetry.py` formats records."""
    stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(at))
    pairs = " ".join([f"{name}={_shown(value)}" for name, value in values.items() if value is not None])
    return f"{stamp}.{int(at * 1000) % 1000:03d}Z INFO {process} {__name__}: {what} {pairs}\n"


def request_values(
    record: Record | None, *, request_id: str, tenant: str, call: str, status: str, model: str, total_s: float
) -> dict[str, Value]:
    """`record`: of what was generated; None where nothing was. `call`: such as `POST /v1/completions`."""
    values: dict[str, Value] = {"id": request_id, "tenant": tenant, "call": call, "status": status}
    if record is not None:
        ends = {note.choice: note.ended for note in record.attempts}
        first_s = min([note.first_token_s for note in record.attempts if note.first_token_s is not None], default=None)
        last = record.attempts[-1] if record.attempts else None
        values |= {
            "model": model,
            "outcome": record.outcome,
            "finish": ",".join(dict.fromkeys(end or "cut" for end in ends.values())) or None,
            "prompt_tokens": record.prompt_tokens,
            "cached_tokens": record.cached_tokens,
            "output_tokens": record.output_tokens,
            "queue_ms": _milliseconds(record.granted_s),
            "ttft_ms": _milliseconds(first_s),
            "worker": last.decode if last is not None else None,
            "prefill": last.prefill if last is not None else None,
            "attempts": len(record.attempts) if len(record.attempts) > record.choices else None,
        }
    return values | {"total_ms": _milliseconds(total_s)}


def _milliseconds(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds * 1000, 1)


def _shown(value: Value) -> str:
    if not isinstance(value, str):
        return str(value)
    return value if _PLAIN.fullmatch(value) and len(value) <= MAX_VALUE_CHARACTERS else _quoted(value)


def _quoted(text: str) -> str:
    return json.dumps(text if len(text) <= MAX_VALUE_CHARACTERS else text[:MAX_VALUE_CHARACTERS] + "...")


def _to_stderr(text: str) -> None:
    sys.stderr.write(text)
    sys.stderr.flush()
