"""Patterns of ranges match the numbers in them and no others."""

from __future__ import annotations

import re

from hypothesis import example, given
from hypothesis import strategies as st

from tandem.router.structured.integers import integers, numbers

BOUND = st.none() | st.integers(-120, 120) | st.integers(-(2**65), 2**65)
NEAR = st.integers(-150, 150) | st.integers(-(2**66), 2**66)


@given(low=BOUND, high=BOUND, value=NEAR, near=st.sampled_from([-1, 0, 1]), at_high=st.booleans())
@example(-(2**63), 2**63 - 1, 2**63, 0, True)
@example(10**300, 10**301, 10**300, 0, False)
def test_integers(low: int | None, high: int | None, value: int, near: int, at_high: bool) -> None:
    pattern = re.compile(integers(low, high) or r"[^\s\S]")
    bound = high if at_high else low
    for number in (value, value if bound is None else bound + near):
        inside = (low is None or low <= number) and (high is None or number <= high)
        assert bool(pattern.fullmatch(str(number))) == inside
    for text in ("", "-", "-0", "00", f"0{value}", f"{value}.0", f"{value}e1"):
        assert not pattern.fullmatch(text)


@given(low=BOUND, high=BOUND, value=st.integers(-150, 150), digits=st.sampled_from(["0", "5", "25", "999"]))
def test_numbers(low: int | None, high: int | None, value: int, digits: str) -> None:
    """With a fraction those next to an end are left out, on its inner side or on it."""
    pattern = re.compile(numbers(low, high) or r"[^\s\S]")
    for text in (str(value), f"{value}.{digits}", f"-0.{digits}"):
        number = float(text)
        matches = bool(pattern.fullmatch(text))
        assert not matches or ((low is None or low <= number) and (high is None or number <= high))
        if (low is None or low + 1 <= number) and (high is None or number <= high - 1):
            assert matches
