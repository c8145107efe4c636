"""A table of measured points: between them, beyond them, and what is wrong with one."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tandem.common.errors import ConfigError
from tandem.planner.measured import Point, Table, read_points, write_points
from tandem.planner.performance import Chunk, max_concurrency

TABLE = """\
# one device
phase,tokens,context,seconds,watts
prefill,100,0,0.01,300
prefill,1000,0,0.1,400
prefill,1000,0,0.3,400
prefill,1000,0,0.1,400

prefill,1000,1000,0.12,400
decode,1,100,0.005,200
decode,1,1100,0.006,200
decode,9,100,0.013,250
"""
POINTS = read_points(TABLE.splitlines(keepends=True))
REPLICA = Table(POINTS, 5000, {"host": (0.001, 1e-6)})


def test_measured_points_are_what_was_measured() -> None:
    assert REPLICA.prefill_s(100) == 0.01
    assert REPLICA.prefill_s(1000) == 0.1, "the median of three"
    assert REPLICA.prefill_s(1000, 1000) == 0.12
    assert REPLICA.decode_step_s(1, 100) == 0.005
    assert REPLICA.decode_step_s(9, 900) == 0.013


def test_between_points_it_goes_straight() -> None:
    assert REPLICA.prefill_s(550) == pytest.approx(0.055)
    assert REPLICA.prefill_s(1000, 500) == pytest.approx(0.11)
    assert REPLICA.decode_step_s(1, 600) == pytest.approx(0.0055)
    assert REPLICA.decode_step_s(5, 500) == pytest.approx(0.009)


def test_beyond_the_points_the_last_line_goes_on_and_below_them_the_first_time_holds() -> None:
    assert REPLICA.prefill_s(1900) == pytest.approx(0.19)
    assert REPLICA.prefill_s(1) == 0.01
    assert REPLICA.decode_step_s(17, 1700) == pytest.approx(0.021)
    falling = Table([Point("decode", 1, 0, 0.2), Point("decode", 2, 0, 0.1)], 10)
    assert falling.decode_step_s(50, 0) == 0.1


def test_what_was_measured_at_one_context_borrows_the_slope_of_the_others() -> None:
    """Decoding of one request: 1e-6 s for a token of context; for 9 requests each it is 9 times that."""
    assert REPLICA.decode_step_s(9, 9 * 1100) == pytest.approx(0.013 + 9 * 1e-6 * 1000)


def test_nothing_takes_no_time_and_links_are_those_that_were_given() -> None:
    assert REPLICA.prefill_s(0) == REPLICA.decode_step_s(0, 0) == REPLICA.step_s((), 0, 0) == 0.0
    assert REPLICA.transfer_s("host", 1000) == pytest.approx(0.002)
    assert REPLICA.transfer_s("host", 0) == 0.0
    assert REPLICA.transfer_s("disk", 1) == math.inf
    assert max_concurrency(REPLICA, 1000) == 5


def test_prompts_beside_decoding_pay_the_constant_part_once() -> None:
    alone, beside = REPLICA.step_s([Chunk(1000)], 0, 0), REPLICA.step_s([Chunk(400), Chunk(600)], 9, 900)
    assert alone == 0.1
    assert beside == pytest.approx(0.013 + 0.1 - 0.01)


@settings(deadline=None, max_examples=60)
@given(
    st.lists(
        st.builds(
            Point,
            st.sampled_from(["prefill", "decode"]),
            st.integers(1, 10_000).map(float),
            st.integers(0, 10_000).map(float),
            st.floats(1e-6, 100.0),
        ),
        min_size=1,
        max_size=30,
    ),
    st.floats(1, 1e6),
    st.floats(0, 1e6),
)
def test_whatever_was_measured_times_are_finite_and_tables_are_read_as_written(
    points: list[Point], tokens: float, context: float
) -> None:
    table = Table(points, 1000)
    if any(p.phase == "prefill" for p in points):
        assert 0.0 < table.prefill_s(tokens, context) < math.inf
    if any(p.phase == "decode" for p in points):
        assert 0.0 < table.decode_step_s(tokens, tokens * context) < math.inf
    read = read_points(write_points(points).splitlines())
    assert [(p.phase, p.tokens, p.context) for p in read] == [(p.phase, p.tokens, p.context) for p in points]


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("", "has no row"),
        ("phase,tokens,context,seconds\n", "has no row"),
        ("phase,context,seconds\n", "line 1: column tokens is missing"),
        ("phase,tokens,seconds\n\nwait,1,2\n", "line 3: phase: 'wait' must be prefill or decode"),
        ("phase,tokens,seconds\nprefill,many,2\n", "line 2: tokens: 'many' is not a number"),
        ("phase,tokens,seconds\nprefill,1,nan\n", "line 2: seconds: nan must be finite"),
        ("phase,tokens,seconds\nprefill,0,1\n", "line 2: tokens: 0 must be finite"),
        ("phase,tokens,seconds\nprefill,5\n", "line 2: seconds: '' is not a number"),
        ("phase,tokens,context,seconds\nprefill,5,-1,1\n", "line 2: context: -1 must be finite and 0 or more"),
    ],
)
def test_a_mistake_in_a_table_names_line_and_column(text: str, names: str) -> None:
    with pytest.raises(ConfigError, match=names):
        read_points(text.splitlines(keepends=True))


def test_a_phase_that_nobody_measured_is_named() -> None:
    table = Table([Point("decode", 1, 0, 0.1)], 10)
    with pytest.raises(ConfigError, match="has no prefill row"):
        table.prefill_s(5)
    with pytest.raises(ConfigError, match="kv_tokens: nan"):
        Table([Point("decode", 1, 0, 0.1)], math.nan)
