"""How much a body of JSON will cost to read, counted in its bytes before anything is made of it.

A decoder holds the interpreter until it is done, in whatever thread: a thousand times longer for a megabyte of small
values than for a megabyte of text. So values are counted first, with array operations that hold nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tandem.common.errors import TandemError

MAX_VALUES = 1 << 19
"""Numbers, texts, objects and so on of one body: 20 ms of the decoder. OpenAI takes 300,000 token ids at a time."""
MAX_CONTAINERS = 1 << 16
"""Objects and arrays among them, which others walk through."""
MAX_NAMES = 1 << 17
"""Names of fields: 30 ms of the decoder where all differ."""
MAX_NUMBER_DIGITS = 512
"""Digits of one number: reading an integer takes the square of its length."""

_QUOTE, _BACKSLASH, _COMMA, _COLON = b'"\\,:'
_IN_NUMBERS = np.frombuffer(b"0123456789.eE+-", np.uint8)
_STRIDE = 64
_BEGINNING_BYTES = 2 << 20
"""Most of what is far too much is seen in so much of it."""

Bytes = npt.NDArray[np.uint8]
Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class JsonSize:
    """Counts of valid JSON; of what is not, at least as much as is read before the mistake."""

    values: int
    containers: int
    names: int
    number_digits: int
    """Digits of the longest number."""
    depth: int


def check_size(raw: bytes) -> None:
    """Raises TandemError `request_too_large`."""
    for part in (raw[:_BEGINNING_BYTES], raw) if len(raw) > _BEGINNING_BYTES else (raw,):
        if _over(_most(part)) is not None and (problem := _over(json_size(part))) is not None:
            raise TandemError("request_too_large", f"the body holds {problem}; send less in one request")


def json_size(raw: bytes) -> JsonSize:
    """Exact."""
    data = np.frombuffer(raw, np.uint8)
    outside = _outside_texts(data)
    opening, closing = _brackets(data, outside)
    places = np.flatnonzero(opening | closing)
    levels = np.cumsum(np.where(opening[places], 1, -1))
    containers = int(np.count_nonzero(opening))
    commas = int(np.count_nonzero((data == _COMMA) & outside))
    return JsonSize(
        values=1 + commas + containers,
        containers=containers,
        names=int(np.count_nonzero((data == _COLON) & outside)),
        number_digits=_longest_run(np.isin(data, _IN_NUMBERS) & outside),
        depth=int(levels.max(initial=0)),
    )


def _most(raw: bytes) -> JsonSize:
    """A size that is at least as large, and quickly found: as if texts were no texts."""
    data = np.frombuffer(raw, np.uint8)
    opening, _ = _brackets(data, np.True_)
    containers, commas = int(np.count_nonzero(opening)), int(np.count_nonzero(data == _COMMA))
    sampled = np.isin(data[::_STRIDE], _IN_NUMBERS)
    digits = (_longest_run(sampled) + 2) * _STRIDE
    return JsonSize(1 + commas + containers, containers, int(np.count_nonzero(data == _COLON)), digits, containers)


def _over(size: JsonSize) -> str | None:
    """What is too much."""
    for found, most, what in (
        (size.values, MAX_VALUES, "values"),
        (size.containers, MAX_CONTAINERS, "objects and arrays"),
        (size.names, MAX_NAMES, "names of fields"),
        (size.number_digits, MAX_NUMBER_DIGITS, "digits in one number"),
    ):
        if found > most:
            return f"more than {most} {what}"
    return None


def _outside_texts(data: Bytes) -> Mask:
    quotes = data == _QUOTE
    slashes = np.flatnonzero(data == _BACKSLASH)
    if slashes.size:
        begins = np.flatnonzero(np.diff(slashes, prepend=-2) != 1)
        lengths = np.diff(begins, append=slashes.size)
        escaped = slashes[begins] + lengths
        escaped = escaped[(lengths % 2 == 1) & (escaped < data.size)]
        quotes[escaped] = False
    inside: Mask = np.logical_xor.accumulate(quotes)
    outside: Mask = ~(inside | quotes)
    return outside


def _brackets(data: Bytes, where: Mask | np.bool_) -> tuple[Mask, Mask]:
    """Opening and closing ones. `[` and `{`, `]` and `}` differ in one bit."""
    folded = data | 0x20
    return (folded == ord("{")) & where, (folded == ord("}")) & where


def _longest_run(mask: Mask) -> int:
    edges = np.flatnonzero(np.diff(mask, prepend=False, append=False))
    return int((edges[1::2] - edges[::2]).max(initial=0))
