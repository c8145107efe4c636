"""Stop strings found in a stream are those found in the whole text."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from tandem.router.text.stop import StopMatcher


def found_in_whole(text: str, stops: list[str]) -> tuple[str, str | None]:
    """The obvious way: the match that is complete first, read character by character."""
    for end in range(len(text) + 1):
        matches = [stop for stop in stops if text[:end].endswith(stop)]
        if matches:
            stop = max(matches, key=len)
            return text[: end - len(stop)], stop
    return text, None


pieces = st.lists(st.text("ab#", max_size=4), max_size=12)
stop_lists = st.lists(st.text("ab#", min_size=1, max_size=5), min_size=1, max_size=4)


@given(pieces, stop_lists)
def test_stream_equals_whole(parts: list[str], stops: list[str]) -> None:
    matcher = StopMatcher(stops)
    expected, expected_stop = found_in_whole("".join(parts), stops)
    shown, matched = "", None
    for part in parts:
        result = matcher.feed(part)
        shown += result.text
        assert expected.startswith(shown), "text of a stop string was shown"
        matched = result.matched
        if matched is not None:
            break
    else:
        shown += matcher.flush()
    assert (shown, matched) == (expected, expected_stop)


@given(pieces, stop_lists)
def test_little_is_held_back(parts: list[str], stops: list[str]) -> None:
    matcher = StopMatcher(stops)
    longest = max(map(len, stops))
    for part in parts:
        if matcher.feed(part).matched is not None:
            break
        assert len(matcher.held) < longest
        assert not matcher.held or any(stop.startswith(matcher.held) for stop in stops)


def test_without_stops_nothing_is_held() -> None:
    assert StopMatcher([]).feed("abc").text == "abc"


def test_long_stop_strings_cost_no_more_than_a_step_for_each_character() -> None:
    """A text that nearly matches: looking for beginnings anew would take a thousand steps for each."""
    matcher = StopMatcher(["a" * 999 + last for last in "bcdefghijklmnopq"])
    advanced = 0
    advance = matcher._advance

    def counting(character: str) -> str | None:
        nonlocal advanced
        advanced += 1
        return advance(character)

    matcher._advance = counting  # type: ignore[method-assign]
    shown = "".join(matcher.feed("a").text for _ in range(5000))
    assert advanced == 5000
    assert shown + matcher.held == "a" * 5000
    assert len(matcher.held) == 999
    assert matcher.feed("b").matched == "a" * 999 + "b"


@given(st.lists(st.text("ab", max_size=40), max_size=12), st.lists(st.text("ab", min_size=1, max_size=12), min_size=1))
def test_strings_that_repeat_themselves_are_found_too(parts: list[str], stops: list[str]) -> None:
    matcher = StopMatcher(stops)
    expected, expected_stop = found_in_whole("".join(parts), stops)
    shown, matched = "", None
    for part in parts:
        result = matcher.feed(part)
        shown, matched = shown + result.text, result.matched
        if matched is not None:
            break
    else:
        shown += matcher.flush()
    assert (shown, matched) == (expected, expected_stop)
