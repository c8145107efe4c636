"""Arguments of tool calls that are sent back as history: JSON, or what of it was written before an answer was cut
off."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import msgspec

from tandem.router.fields.json_depth import too_deep


class CutArguments(Mapping[str, Any]):
    """Arguments for a chat template: a mapping without keys, which is written as the text that there is."""

    def __init__(self, text: str) -> None:
        self.text = text

    def __getitem__(self, key: str) -> Any:
        raise KeyError(key)

    def __iter__(self) -> Iterator[str]:
        return iter(())

    def __len__(self) -> int:
        return 0

    def __bool__(self) -> bool:
        return bool(self.text)

    def __str__(self) -> str:
        return self.text


def arguments_of(text: str) -> dict[str, Any] | CutArguments:
    """Empty text stands for no arguments."""
    try:
        arguments = msgspec.json.decode(text or "{}")
    except (msgspec.MsgspecError, RecursionError, UnicodeError):
        arguments = None
    usable = isinstance(arguments, dict) and not too_deep(arguments)
    return arguments if usable else CutArguments(text)
