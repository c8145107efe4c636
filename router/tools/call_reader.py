"""Reads one tool call, a JSON object with a name and arguments, character by character while it is generated."""

from __future__ import annotations

import json
from typing import Literal

from tandem.router.tools.events import Writer

_ARGUMENTS = frozenset({"arguments", "parameters"})
_BLANKS = frozenset(" \t\r\n")


class CallReader:
    """Writes the call's start as soon as its name is known, and the arguments as they come, exactly as written.

    `end` says how it went: "done" after the closing brace; "broken" where the text is no call. Until the start is
    written nothing is lost: `raw` is the text that was read so far.
    """

    def __init__(self, writer: Writer, names: frozenset[str] | None = None) -> None:
        """`names`: a call of another function is none. None: any name will do."""
        self.end: Literal["", "done", "broken"] = ""
        self.started = False
        self._raw: list[str] = []
        self._writer = writer
        self._names = names
        self._depth = 0
        self._in_string = False
        self._escaped = False
        self._expect: Literal["open", "key", "colon", "value", "comma"] = "open"
        self._key = ""
        self._value: list[str] = []
        self._waiting: str | None = None
        """Complete arguments that came before the name."""
        self._live = False
        """The value that is being read is the arguments of a call that has started."""
        self._written = False
        self._only_arguments = False

    @classmethod
    def of_arguments(cls, writer: Writer, name: str) -> CallReader:
        """A reader for a call whose name was written otherwise: it reads the arguments and ends with them."""
        reader = cls(writer)
        reader._depth, reader._expect, reader._key = 1, "value", "arguments"
        reader._only_arguments = True
        reader._named(name)
        return reader

    @property
    def raw(self) -> str:
        return "".join(self._raw)

    def feed(self, text: str) -> str:
        """Returns what is left after the end of the call."""
        for position, char in enumerate(text):
            if not self.started:
                self._raw.append(char)
            self._take(char)
            if self.end:
                self._flush()
                return text[position + 1 :]
        self._flush()
        return ""

    def _take(self, char: str) -> None:
        if self._in_string:
            self._value.append(char)
            if self._escaped:
                self._escaped = False
            elif char == "\\":
                self._escaped = True
            elif char == '"':
                self._in_string = False
                if self._depth == 1:
                    self._string_ended()
            return
        if char in _BLANKS:
            if self._expect == "value" and self._value:
                self._value.append(char)
            return
        match self._expect:
            case "open":
                self._depth, self._expect = 1, "key"
                if char != "{":
                    self.end = "broken"
            case "key":
                if char == '"':
                    self._in_string = True
                    self._value = [char]
                elif char == "}":
                    self._close()
                else:
                    self.end = "broken"
            case "colon":
                self._expect, self._value = "value", []
                if char != ":":
                    self.end = "broken"
            case "value":
                self._take_value(char)
            case "comma":
                self._after_value(char)

    def _take_value(self, char: str) -> None:
        if self._depth == 1 and char in ",}]" and self._value:  # a number, true, false or null ends here
            self._value_ended()
            self._after_value(char)
            return
        if not self._value and self._key in _ARGUMENTS and char == "{" and self.started:
            self._live = True
        self._value.append(char)
        if char == '"':
            self._in_string = True
        elif char in "{[":
            self._depth += 1
        elif char in "}]":
            self._depth -= 1
            if self._depth == 1:
                self._value_ended()
            elif self._depth < 1:
                self.end = "broken"

    def _string_ended(self) -> None:
        if self._expect == "key":
            self._key = str(_decoded("".join(self._value)))
            self._expect = "colon"
        elif self._expect == "value":
            self._value_ended()

    def _value_ended(self) -> None:
        text = "".join(self._value).strip()
        self._expect = "comma"
        if self._live:
            self._flush()
            self._live, self._written = False, True
        elif self._key == "name" and not self.started:
            self._named(_decoded(text))
        elif self._key in _ARGUMENTS and not self._written:
            self._waiting = _unwrapped(text)
            if self._waiting is None:
                self.end = "broken"
            self._write_waiting()
        self._value = []
        if self._only_arguments:
            self.end = self.end or "done"

    def _named(self, name: object) -> None:
        if not isinstance(name, str) or not name or (self._names is not None and name not in self._names):
            self.end = "broken"
            return
        self.started, self._raw = True, []
        self._writer.start(name)
        self._write_waiting()

    def _write_waiting(self) -> None:
        if self.started and self._waiting is not None:
            self._writer.arguments(self._waiting)
            self._waiting, self._written = None, True

    def _after_value(self, char: str) -> None:
        if char == ",":
            self._expect = "key"
        elif char == "}":
            self._close()
        else:
            self.end = "broken"

    def _close(self) -> None:
        self.end = "done" if self.started else "broken"
        if self.started and not self._written:
            self._writer.arguments("{}")

    def _flush(self) -> None:
        if self._live:
            self._writer.arguments("".join(self._value))
            self._value = [""]  # not empty: the value has begun


def _decoded(text: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _unwrapped(text: str) -> str | None:
    """Arguments that are not streamed: some models write them as a string that holds JSON, or as null."""
    value = _decoded(text)
    if isinstance(value, str):
        return value if isinstance(_decoded(value), dict) else None
    if value is None and text == "null":
        return "{}"
    return text if text.startswith("{") else None
