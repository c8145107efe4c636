"""What a model's output means to a client: text, and tool calls, piece by piece as they are generated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Text:
    text: str


@dataclass(frozen=True, slots=True)
class CallStart:
    index: int
    """0 for the first tool call of the answer."""
    name: str


@dataclass(frozen=True, slots=True)
class CallArguments:
    index: int
    text: str
    """The next part of the arguments, which are JSON when they are complete."""


Event = Text | CallStart | CallArguments


class ToolParser(Protocol):
    """Turns the text of one choice into events. The same events, joined, come of any cut of the text into pieces."""

    def feed(self, text: str) -> list[Event]: ...

    def finish(self) -> list[Event]:
        """The output is complete: what was held back."""


class PlainText:
    """The parser for requests without tools: everything is text."""

    def feed(self, text: str) -> list[Event]:
        return [Text(text)] if text else []

    def finish(self) -> list[Event]:
        return []


@dataclass(frozen=True, slots=True)
class Call:
    name: str
    arguments: str


def collect(events: Sequence[Event]) -> tuple[str, list[Call]]:
    """Text and tool calls of a whole answer."""
    texts: list[str] = []
    names: list[str] = []
    arguments: list[list[str]] = []
    for event in events:
        match event:
            case Text(text):
                texts.append(text)
            case CallStart(_, name):
                names.append(name)
                arguments.append([])
            case CallArguments(index, text):
                arguments[index].append(text)
    return "".join(texts), [Call(name, "".join(parts)) for name, parts in zip(names, arguments, strict=True)]


class Writer:
    """Collects events for a parser: numbers the tool calls, drops blanks next to them."""

    def __init__(self) -> None:
        self._events: list[Event] = []
        self._blanks = ""
        self.calls = 0

    def text(self, text: str) -> None:
        """Trailing blanks wait for what follows: before a call they are not part of the answer."""
        text = self._blanks + text
        shown = text.rstrip()
        self._blanks = text[len(shown) :]
        if shown:
            self._events.append(Text(shown))

    def start(self, name: str) -> None:
        self._blanks = ""
        self.calls += 1
        self._events.append(CallStart(self.calls - 1, name))

    def arguments(self, text: str) -> None:
        if text:
            self._events.append(CallArguments(self.calls - 1, text))

    def end(self) -> None:
        """Blanks at the end of a text without calls are kept."""
        if self._blanks and not self.calls:
            self._events.append(Text(self._blanks))
        self._blanks = ""

    def take(self) -> list[Event]:
        events, self._events = self._events, []
        return events


def split_at(text: str, marker: str) -> tuple[str, str, bool]:
    """(text before the marker, text after it, True), or (certain text, possible beginning of the marker, False)."""
    before, found, after = text.partition(marker)
    if found:
        return before, after, True
    start = text.find(marker[0], max(0, len(text) - len(marker) + 1))
    while start >= 0:
        if marker.startswith(text[start:]):
            return text[:start], text[start:], False
        start = text.find(marker[0], start + 1)
    return text, "", False
