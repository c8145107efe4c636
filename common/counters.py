"""Counts things on any thread, and gives the figures of a moment as a frozen dataclass."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

    _Stats = TypeVar("_Stats", bound=DataclassInstance)
else:
    _Stats = TypeVar("_Stats")


class Counters(Generic[_Stats]):
    """Counts the fields of one dataclass, which are numbers, or mappings of numbers by label."""

    def __init__(self, zero: _Stats) -> None:
        """`zero`: before anything is counted."""
        self._zero = zero
        self._lock = threading.Lock()
        values = {field.name: getattr(zero, field.name) for field in fields(zero)}
        self._numbers = {name: value for name, value in values.items() if not isinstance(value, Mapping)}
        self._labelled: dict[str, dict[str, float]] = {
            name: defaultdict(int) for name in values.keys() - self._numbers.keys()
        }

    def add(self, **amounts: float) -> None:
        """Adds each to the field of its name, all at once."""
        with self._lock:
            for name, amount in amounts.items():
                self._numbers[name] += amount

    def count(self, name: str, label: str, amount: float = 1) -> None:
        """Adds to what is under `label` of a mapping."""
        with self._lock:
            self._labelled[name][label] += amount

    def snapshot(self) -> _Stats:
        """The figures of this moment."""
        with self._lock:
            return replace(self._zero, **self._numbers, **{name: dict(each) for name, each in self._labelled.items()})
