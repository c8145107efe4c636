"""Hermes and Qwen: `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`, one block for each call.

Models also put several calls into one block, one after the other or as a list.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

from tandem.router.tools.call_reader import CallReader
from tandem.router.tools.events import Event, Writer, split_at
from tandem.router.tools.grammar import json_calls

OPEN = "<tool_call>"
CLOSE = "</tool_call>"
_BETWEEN = " \t\r\n,;"


class HermesParser:
    """A `ToolParser` of one choice."""

    def __init__(self, names: frozenset[str]) -> None:
        self._writer = Writer()
        self._held = ""
        self._reader: CallReader | None = None
        self._at: Literal["text", "opened", "call", "called", "closing"] = "text"
        """called: after a call, before its closing mark, which should come next; closing: after what else there is."""
        self._read = ""
        """Text before a call that belongs to it, in case that it is none."""

    def feed(self, text: str) -> list[Event]:
        """Events that the next piece of text makes certain."""
        self._held += text
        while self._step():
            pass
        return self._writer.take()

    def finish(self) -> list[Event]:
        """Events for what was held back; a call that never began is text."""
        if self._reader is not None and not self._reader.started:
            self._writer.text(self._read + self._reader.raw)
        elif self._at in ("text", "opened"):
            self._writer.text(self._read + self._held)
        self._writer.end()
        return self._writer.take()

    def _step(self) -> bool:
        """Takes something from `_held`; False when nothing more can be taken of it."""
        match self._at:
            case "text":
                before, self._held, found = split_at(self._held, OPEN)
                self._writer.text(before)
                if found:
                    self._at, self._read = "opened", OPEN
                return found
            case "opened":
                return self._open()
            case "call":
                return self._call()
            case "called":
                return self._after_call()
            case "closing":
                _, self._held, found = split_at(self._held, CLOSE)
                if found:
                    self._at = "text"
                return found

    def _open(self) -> bool:
        text = self._held.lstrip()
        if not text:
            return False
        text = text.removeprefix("[")
        self._begin(self._held[: len(self._held) - len(text)], text)
        return True

    def _begin(self, before: str, text: str) -> None:
        self._read += before
        self._held = text
        self._reader, self._at = CallReader(self._writer), "call"

    def _call(self) -> bool:
        assert self._reader is not None
        self._held = self._reader.feed(self._held)
        if not self._reader.end:
            return False
        if self._reader.started:
            self._at = "called" if self._reader.end == "done" else "closing"
        else:
            self._writer.text(self._read + self._reader.raw)
            self._at = "text"
        self._reader, self._read = None, ""
        return True

    def _after_call(self) -> bool:
        text = self._held.lstrip(_BETWEEN)
        if text.startswith("{"):
            self._begin(self._held[: len(self._held) - len(text)], text)
        elif text.startswith("]"):
            self._held = text[1:]
        elif text.startswith(CLOSE):
            self._held, self._at = text.removeprefix(CLOSE), "text"
        elif CLOSE.startswith(text):
            return False
        else:
            self._at = "text"  # the mark was forgotten
        return True


def hermes_rules(calls: Sequence[tuple[str, str]], parallel: bool, mark: Callable[[str], str]) -> list[str]:
    """Rules in Lark of which `calls` is the first: one call, or several where `parallel`. `mark` writes a special token
    in the grammar."""
    several = ' ("\\n" call)*' if parallel else ""
    return [
        f"calls: call{several}",
        f'call: {mark(OPEN)} "\\n" body "\\n" {mark(CLOSE)}',
        f"body: {json_calls(calls, 'arguments')}",
    ]
