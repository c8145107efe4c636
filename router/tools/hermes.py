"""Hermes and Qwen: `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`, one block for each call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

from tandem.router.tools.call_reader import CallReader
from tandem.router.tools.events import Event, Writer, split_at
from tandem.router.tools.grammar import json_calls

OPEN = "<tool_call>"
CLOSE = "</tool_call>"


class HermesParser:
    def __init__(self, names: frozenset[str]) -> None:
        self._writer = Writer()
        self._held = ""
        self._reader: CallReader | None = None
        self._closing: Literal["", "near", "far"] = ""
        """After a call, before its closing mark, which should come next; far: after what else there is."""

    def feed(self, text: str) -> list[Event]:
        self._held += text
        while self._step():
            pass
        return self._writer.take()

    def finish(self) -> list[Event]:
        if self._reader is not None and not self._reader.started:
            self._writer.text(OPEN + self._reader.raw)
        elif self._reader is None and not self._closing:
            self._writer.text(self._held)
        self._writer.end()
        return self._writer.take()

    def _step(self) -> bool:
        """Takes something from `_held`; False when nothing more can be taken of it."""
        if self._reader is not None:
            self._held = self._reader.feed(self._held)
            if not self._reader.end:
                return False
            if self._reader.end == "broken" and not self._reader.started:
                self._writer.text(OPEN + self._reader.raw)
            else:
                self._closing = "near" if self._reader.end == "done" else "far"
            self._reader = None
            return True
        if self._closing:
            return self._close()
        before, self._held, found = split_at(self._held, OPEN)
        self._writer.text(before)
        if found:
            self._reader = CallReader(self._writer)
        return found

    def _close(self) -> bool:
        text = self._held.lstrip()
        if self._closing == "near" and not CLOSE.startswith(text[: len(CLOSE)]):
            self._closing = ""  # the mark was forgotten
            return True
        _, self._held, found = split_at(self._held, CLOSE)
        if found:
            self._closing = ""
        return found


def hermes_rules(calls: Sequence[tuple[str, str]], parallel: bool, mark: Callable[[str], str]) -> list[str]:
    several = ' ("\\n" call)*' if parallel else ""
    return [
        f"calls: call{several}",
        f'call: {mark(OPEN)} "\\n" body "\\n" {mark(CLOSE)}',
        f"body: {json_calls(calls, 'arguments')}",
    ]
