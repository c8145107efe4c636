"""Mistral: `[TOOL_CALLS]`, then a JSON list of calls, or with newer models `name[ARGS]{...}` for each call."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Literal

from tandem.router.tools.call_reader import CallReader
from tandem.router.tools.events import Event, Writer, split_at
from tandem.router.tools.grammar import json_calls, literal

MARK = "[TOOL_CALLS]"
ARGS = "[ARGS]"
MAX_HEAD = 256
"""Characters between the mark and the arguments; more than a name and a call id need."""
_NAME = re.compile(r"[A-Za-z0-9_.\-]{1,64}")


class MistralParser:
    """A `ToolParser` of one choice, for both forms."""

    def __init__(self, names: frozenset[str]) -> None:
        self._writer = Writer()
        self._held = ""
        self._reader: CallReader | None = None
        self._at: Literal["text", "marked", "list", "named"] = "text"
        self._read = ""
        """Text of a call that has not started yet, in case that it is none."""

    def feed(self, text: str) -> list[Event]:
        """Events that the next piece of text makes certain."""
        self._held += text
        while self._step():
            pass
        return self._writer.take()

    def finish(self) -> list[Event]:
        """Events for what was held back; a call that never began is text."""
        if self._reader is not None:
            if not self._reader.started:
                self._writer.text(self._read + self._reader.raw)
        elif self._at != "list":
            self._writer.text(self._read + self._held)
        self._writer.end()
        return self._writer.take()

    def _step(self) -> bool:
        if self._reader is not None:
            return self._read_call(self._reader)
        match self._at:
            case "text":
                before, self._held, found = split_at(self._held, MARK)
                self._writer.text(before)
                if found:
                    self._at, self._read = "marked", MARK
                return found
            case "marked":
                return self._choose_form()
            case "list":
                return self._next_in_list()
            case "named":
                return self._name()

    def _choose_form(self) -> bool:
        text = self._held.lstrip()
        if not text:
            return False
        if text.startswith("["):
            self._read += self._held[: len(self._held) - len(text) + 1]
            self._held = text[1:]
            self._at = "list"
        else:
            self._at = "named"
        return True

    def _next_in_list(self) -> bool:
        text = self._held.lstrip(" \t\r\n,")
        if not text:
            return False
        self._held = text
        if text.startswith("]"):
            self._held = text[1:]
            self._to_text()
        else:
            self._reader = CallReader(self._writer)
        return True

    def _name(self) -> bool:
        head, brace, _ = self._held.partition("{")
        if not brace and len(head) <= MAX_HEAD:
            return False
        self._held = self._held[len(head) :]
        self._read += head
        name = head.partition("[")[0].strip()
        if brace and _NAME.fullmatch(name):
            self._reader = CallReader.of_arguments(self._writer, name)
        else:
            self._writer.text(self._read)
            self._to_text()
        return True

    def _read_call(self, reader: CallReader) -> bool:
        self._held = reader.feed(self._held)
        if not reader.end:
            return False
        if reader.end == "broken" and not reader.started:
            self._writer.text(self._read + reader.raw)
        if self._at == "named" or reader.end == "broken":
            self._to_text()
        self._reader, self._read = None, ""
        return True

    def _to_text(self) -> None:
        self._at, self._read = "text", ""


def mistral_list_rules(calls: Sequence[tuple[str, str]], parallel: bool, mark: Callable[[str], str]) -> list[str]:
    several = ' (", " call)*' if parallel else ""
    return [f'calls: {mark(MARK)} " "? "[" call{several} "]"', f"call: {json_calls(calls, 'arguments')}"]


def mistral_named_rules(calls: Sequence[tuple[str, str]], parallel: bool, mark: Callable[[str], str]) -> list[str]:
    body = " | ".join(f"{literal(name)} {mark(ARGS)} {rule}" for name, rule in calls)
    return ["calls: call" + ("+" if parallel else ""), f"call: {mark(MARK)} ({body})"]
