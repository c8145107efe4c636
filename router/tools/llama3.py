"""Llama 3: the whole answer is `{"name": ..., "parameters": {...}}`, several of them parted by a semicolon."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

from tandem.router.tools.call_reader import CallReader
from tandem.router.tools.events import Event, Writer
from tandem.router.tools.grammar import json_calls

TAG = "<|python_tag|>"


class Llama3Parser:
    """JSON that calls no known function is an answer like any other."""

    def __init__(self, names: frozenset[str]) -> None:
        self._names = names
        self._writer = Writer()
        self._held = ""
        self._reader: CallReader | None = None
        self._at: Literal["begin", "call", "between", "text"] = "begin"

    def feed(self, text: str) -> list[Event]:
        """Events that the next piece of text makes certain."""
        self._held += text
        while self._step():
            pass
        return self._writer.take()

    def finish(self) -> list[Event]:
        """Events for what was held back; an answer without a call is text."""
        if self._reader is not None and not self._reader.started:
            self._writer.text(self._reader.raw)
        if not self._writer.calls:
            self._writer.text(self._held)
        self._writer.end()
        return self._writer.take()

    def _step(self) -> bool:
        match self._at:
            case "begin":
                return self._begin()
            case "call":
                return self._read()
            case "between":
                self._held = self._held.lstrip(" \t\r\n;,")
                if not self._held:
                    return False
                self._call_or_text(self._held.startswith("{"))
                return True
            case "text":
                self._writer.text(self._held)
                self._held = ""
                return False

    def _begin(self) -> bool:
        text = self._held.lstrip()
        if not text or (len(text) < len(TAG) and TAG.startswith(text)):
            return False
        if text.startswith(TAG):
            text = text.removeprefix(TAG).lstrip()
            if not text:
                return False
        is_call = text.startswith("{")
        if is_call or self._held.lstrip().startswith(TAG):
            self._held = text
        self._call_or_text(is_call)
        return True

    def _call_or_text(self, is_call: bool) -> None:
        self._at = "call" if is_call else "text"
        self._reader = CallReader(self._writer, self._names) if is_call else None

    def _read(self) -> bool:
        assert self._reader is not None
        self._held = self._reader.feed(self._held)
        if not self._reader.end:
            return False
        if self._reader.end == "broken" and not self._reader.started:
            self._writer.text(self._reader.raw)
            self._at = "text"
        else:
            self._at = "between"
        self._reader = None
        return True


def llama3_rules(calls: Sequence[tuple[str, str]], parallel: bool, mark: Callable[[str], str]) -> list[str]:
    """One call: the templates of these models say that they make one at a time."""
    return [f"calls: {json_calls(calls, 'parameters')}"]
