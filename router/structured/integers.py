"""Regular expressions of ranges of numbers of any size, as JSON writes them."""

from __future__ import annotations


def integers(low: int | None, high: int | None) -> str:
    """An expression of the integers between both, included. None: no limit on this side. Empty where there are none."""
    return "|".join(_signed(low, high, ""))


def numbers(low: int | None, high: int | None) -> str:
    """An expression of the numbers between both, included, with or without a fraction."""
    whole = _signed(low, high, "")
    up_to = None if high is None else high - 1
    parts = [f"{part}[.][0-9]+" for part in _naturals(max(0, low or 0), up_to)]
    least = 0 if high is None else max(0, -high)
    parts += [f"-{part}[.][0-9]+" for part in _naturals(least, None if low is None else -low - 1)]
    return "|".join([*whole, *parts])


def _signed(low: int | None, high: int | None, end: str) -> list[str]:
    least = 1 if high is None else max(1, -high)
    parts = [f"-{part}{end}" for part in _naturals(least, None if low is None else -low)]
    return parts + [f"{part}{end}" for part in _naturals(max(0, low or 0), high)]


def _naturals(low: int, high: int | None) -> list[str]:
    """Patterns of numbers from 0 on; one for each number of digits."""
    if high is not None and low > high:
        return []
    parts: list[str] = []
    if high is None:
        parts.append(f"[1-9][0-9]{{{len(str(low))},}}")
        high = 10 ** len(str(low)) - 1
    while len(str(low)) < len(str(high)):
        last = 10 ** len(str(low)) - 1
        parts.append(_same_length(str(low), str(last)))
        low = last + 1
    return [*parts, _same_length(str(low), str(high))]


def _same_length(low: str, high: str) -> str:
    rest = len(low) - 1
    if low == high:
        return low
    if low[0] == high[0]:
        return low[0] + _same_length(low[1:], high[1:])
    first, last = int(low[0]), int(high[0])
    parts: list[str] = []
    if low[1:].strip("0"):
        parts.append(low[0] + _same_length(low[1:], "9" * rest))
        first += 1
    if high[1:].strip("9"):
        parts.append(high[0] + _same_length("0" * rest, high[1:]))
        last -= 1
    if first <= last:
        parts.append(f"[{first}-{last}]" + (f"[0-9]{{{rest}}}" if rest else ""))
    return f"({'|'.join(parts)})"
